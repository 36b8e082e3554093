"""The wheel: the three packages with what they read at run time, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, **variables: str) -> set[str]:
    """Return the names in a wheel built from a copy of the tree."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("cache_service", "router", "prfaas_sglang", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(folder / "tree")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of the wheel."""
    return build(tmp_path_factory.mktemp("wheel"))


def test_only_the_three_packages(names: set[str]) -> None:
    """No tests, no benchmarks."""
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"cache_service", "router", "prfaas_sglang"}


@pytest.mark.parametrize(
    "name",
    [
        "prfaas_sglang/fleet/examples/demo.yaml",
        "prfaas_sglang/cpu/stand_ins/sgl_kernel/mamba.py",
        "cache_service/wire/cache.proto",
        "cache_service/wire/cache_pb2.pyi",
        "cache_service/native/_index.pyi",
        "router/py.typed",
    ],
)
def test_run_time_files_are_there(names: set[str], name: str) -> None:
    """Examples, the kernels' stand-in, stubs and type markers travel along."""
    assert name in names


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
def test_native_index_is_there(names: set[str]) -> None:
    """Compiled, and without its sources."""
    native = {name.split("/")[-1].split(".")[0] for name in names if name.endswith(".so")}
    assert native == {"_index"}
    assert not [name for name in names if name.endswith((".cpp", ".hpp", ".o"))]


def test_without_a_compiler(tmp_path: Path) -> None:
    """A wheel all the same, with the Python index alone."""
    names = build(tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert "cache_service/native/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]
