"""Who may import whom (ARCHITECTURE.md, "Layers"), read from the source, function bodies included."""

from __future__ import annotations

import ast
import gc
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cache_service", "router", "prfaas_sglang")
FILES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))

#: Effects that no core module may reach, even from the standard library.
EFFECTS = frozenset(
    [
        "asyncio",
        "threading",
        "multiprocessing",
        "socket",
        "ssl",
        "select",
        "selectors",
        "subprocess",
        "time",
        "random",
        "os",
        "logging",
        "queue",
        "signal",
        "concurrent",
        "http",
        "urllib",
        "pathlib",
        "tempfile",
        "shutil",
    ]
)
#: Third-party packages: which folders may import them. Others are free for every shell.
ONLY_IN = {
    "sglang": ("prfaas_sglang/engine", "prfaas_sglang/cpu"),
    "torch": ("prfaas_sglang/engine", "prfaas_sglang/cpu"),
    "transformers": ("prfaas_sglang/cpu",),
    "sgl_kernel": ("prfaas_sglang/cpu",),
    "grpc": ("cache_service",),
    "zmq": ("cache_service", "prfaas_sglang/engine/state_publisher.py"),
    "aiohttp": ("router", "cache_service/http.py", "prfaas_sglang/fleet"),
    "cryptography": ("prfaas_sglang/fleet",),
    "rich": ("prfaas_sglang/fleet", "prfaas_sglang/cli.py"),
}
#: First-party: importer -> what it may import.
MAY_IMPORT = {
    "cache_service": {"cache_service"},
    "router": {"router", "cache_service"},
    "prfaas_sglang": {"prfaas_sglang", "cache_service"},
}
#: The one command of the distribution starts what is in any package.
ALSO = {"prfaas_sglang/cli.py": {"router"}}
HARD_LIMIT_LINES = 500


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere, function bodies included."""
    found: set[str] = set()
    # CPython 3.11 fails with SystemError when a collection inside ast.parse runs somebody's finalizer.
    gc.disable()
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check() -> None:
    """The file list is not empty, in each package."""
    assert {where(p).split("/")[0] for p in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=where)
def test_layers(path: Path) -> None:
    """Each file imports only what its layer may."""
    name = where(path)
    package = name.split("/")[0]
    roots = {target.split(".")[0] for target in imports(path)}
    wrong = {r for r in roots if r in PACKAGES and r not in MAY_IMPORT[package] | ALSO.get(name, set())}
    assert not wrong, f"{name} imports {wrong}"
    for third_party, folders in ONLY_IN.items():
        if third_party in roots:
            assert any(name.startswith(folder) for folder in folders), f"{name} imports {third_party}"


@pytest.mark.parametrize("path", [p for p in FILES if "/core/" in where(p)], ids=where)
def test_cores_are_pure(path: Path) -> None:
    """A core module imports the standard library without effects, and other cores."""
    for target in imports(path):
        root = target.split(".")[0]
        assert root not in EFFECTS, f"{where(path)} imports {target}"
        if root in PACKAGES:
            assert target == root or "core" in target.split("."), f"{where(path)} imports {target}"
        else:
            assert root in sys.stdlib_module_names, f"{where(path)} imports {target}"


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=where)
def test_files_stay_small(path: Path) -> None:
    """One purpose a file: no more than HARD_LIMIT_LINES lines (generated code excepted)."""
    if path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
        return
    assert len(path.read_text(encoding="utf-8").splitlines()) <= HARD_LIMIT_LINES


def test_entry_point_is_import_light() -> None:
    """Importing the plugin in any SGLang process loads neither torch nor SGLang nor our own shells."""
    import subprocess

    script = (
        "import sys, prfaas_sglang.plugin as p; p.register();"
        "bad = {'torch', 'sglang', 'grpc', 'msgspec', 'prfaas_sglang.engine'} & set(sys.modules);"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
