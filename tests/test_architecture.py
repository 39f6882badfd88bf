"""The house of ARCHITECTURE.md, held against the imports: one direction, and three pillars that do not know each other."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bkd_fast"
KERNELS = PACKAGE.parent / "kernels"

# room -> the rooms that it may import (errors is everybody's)
MAY_IMPORT = {
    "errors": set(),
    "kernels": set(),
    "ops": {"kernels", "_native"},
    "noise": {"ops"},
    "collectives": set(),
    "sharding": set(),
    "mesh": {"collectives"},
    "batches": {"ops", "teacher_cache"},
    "checkpoint": {"sampling", "posterior", "collectives", "samplers"},
    "sketch": {"ops"},
    "samplers": {"ops", "sketch", "sharding"},
    "distill": {"ops"},
    "posterior": {"ops", "sketch", "collectives", "sharding"},
    "stacked": set(),
    "energy": {"samplers", "stacked", "sharding", "ops"},
    "sampling": {"energy", "stacked", "samplers", "distill", "posterior", "ops", "sharding"},
    "step_size": {"energy", "samplers"},
    "checking": set(),
    "teacher_cache": {"ops", "posterior", "collectives"},
    "features": {"posterior"},
    "heads": {"sampling", "energy", "distill", "ops"},
    "methods": {
        *("sampling", "energy", "samplers", "distill", "posterior", "ops"),
        *("collectives", "sharding", "stacked", "heads", "sketch"),
    },
}
ANYTHING = {"app", "__init__", "__main__"}  # app stands on top; the package's face shows what it chooses


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py") if path.is_relative_to(PACKAGE) else "kernels"


def _imports(path: Path) -> set[str]:
    """The rooms of ours that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "bkd_fast" else [node.module]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "bkd_fast":
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_imports_go_one_way(path):
    room = _room(path)
    if room in ANYTHING:
        return
    assert room in MAY_IMPORT, f"{room} is a new room: give it a place in ARCHITECTURE.md and here"
    forbidden = _imports(path) - MAY_IMPORT[room] - {room, "errors"}
    assert not forbidden, f"{room} may not import {sorted(forbidden)}"


def test_app_does_what_a_user_could_do():
    """app may import everything below it, but nothing below may import app."""
    for path in FILES:
        if _room(path) not in ANYTHING:
            assert "app" not in _imports(path)


def test_the_native_code_includes_nothing_of_torch_and_headers_of_maths_nothing_of_the_cpu():
    csrc = PACKAGE.parent / "csrc"
    for path in csrc.rglob("*"):
        if path.is_file():
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not any("torch/" in line or "ATen/" in line or "c10/" in line for line in includes), path
    for header in csrc.glob("*.h"):
        outside = [
            i for i in header.read_text().splitlines() if i.startswith("#include") and "cpu/" in i and "simd.h" not in i
        ]
        assert not outside, f"{header.name}: {outside}"


def test_import_is_light():
    """Heavy extras stay out of `import bkd_fast` (the 0.3 s beyond torch are a benchmark's business, not a test's)."""
    heavy = [
        "sklearn",
        "matplotlib",
        "typer",
        "pydantic",
        "rich",
        "triton",
        "cupy",
        "pandas",
        "xarray",
        "arviz",
        "scipy",
    ]
    heavy.append("bkd_fast.app")
    code = f"import sys, torch; old = {{*sys.modules}}; import bkd_fast; print(sorted({{*{heavy}}} & {{*sys.modules}} - old))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_everything_public_is_documented():
    import bkd_fast

    for name in bkd_fast.__all__:
        assert getattr(bkd_fast, name).__doc__, name


def test_a_wheel_has_every_package():
    """An editable installation finds what the list of packages lacks; a wheel does not."""
    configuration = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    folders = {path.parent for path in PACKAGE.rglob("*.py") if KERNELS.name not in path.relative_to(PACKAGE).parts}
    found = {".".join(folder.relative_to(PACKAGE.parent).parts) for folder in folders}
    assert {*configuration["tool"]["setuptools"]["packages"]} == found | {"bkd_fast.kernels", "bkd_fast.csrc"}
