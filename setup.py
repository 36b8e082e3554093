"""The one part that is compiled: the native prefix index. Everything else is in pyproject.toml.

Without a C++ compiler or nanobind it is left out, and the index runs in Python (cache_service/native).
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("cache_service/native")


def extensions() -> list[Extension]:
    """Return the extension, or nothing where nanobind is not installed."""
    try:
        import nanobind
    except ImportError:
        return []
    home = Path(nanobind.source_dir())
    return [
        Extension(
            "cache_service.native._index",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.hpp"))),
            include_dirs=[nanobind.include_dir(), str(home), str(home.parent / "ext/robin_map/include")],
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-fno-strict-aliasing"],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions())
