"""The package's architecture: every import goes downwards, typing ones and those in functions too, and none in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mgfc

PACKAGE = Path(mgfc.__file__).parent
# Rooms (files and folders of the package) from the top floor down. Those of one floor do not know each other.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("interop", "viz", "__init__"),
    ("wrapping",),
    ("calibration",),
    ("attachment", "reports", "storage"),
    ("adapters", "fusing", "images", "lookout"),
    ("blocks", "peft", "placement"),
    ("inplace",),
    ("active", "tree"),
    ("adapter",),
    ("layers",),
    ("features", "heads", "losses", "config"),
    ("backbones", "calibrators"),
    ("distributed", "errors", "_version"),
)


def modules(package: Path) -> dict[str, Path]:
    """Files by dotted name relative to the package; "" is the package itself."""
    names = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in sorted(package.rglob("*.py"))}
    return {("" if name == "__init__" else name.removesuffix(".__init__")): path for path, name in names.items()}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name.removeprefix("mgfc.") in known else str(node.module) for name in names]
        yield from (name.removeprefix("mgfc").removeprefix(".") for name in found if name.partition(".")[0] == "mgfc")


def graph(package: Path) -> dict[str, set[str]]:
    known = modules(package)
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def room(module: str) -> str:
    return module.partition(".")[0] or "__init__"


def floor(module: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if room(module) in rooms)


def upwards(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports between rooms that do not go to a lower floor."""
    pairs = [(source, target) for source, targets in arrows.items() for target in sorted(targets)]
    return [(a, b) for a, b in pairs if room(a) != room(b) and floor(a) >= floor(b)]


def test_every_room_has_a_floor() -> None:
    assert sorted({room(name) for name in modules(PACKAGE)}) == sorted(name for rooms in FLOORS for name in rooms)


def test_every_import_goes_downwards() -> None:
    assert upwards(graph(PACKAGE)) == []


def test_no_imports_in_a_circle() -> None:
    TopologicalSorter(graph(PACKAGE)).prepare()


def test_no_long_files() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules(PACKAGE).items()}
    assert {name: length for name, length in lengths.items() if length > 250} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from mgfc.calibration import Calibration",
        "import mgfc.wrapping",
        "from mgfc import wrapping",
        "def f():\n    from mgfc.storage import directory",
        "if TYPE_CHECKING:\n    from mgfc.blocks import BlockHooks",
        "from mgfc import wrap_backbone",
    ],
)
def test_an_arrow_upwards_or_a_circle_is_found(line: str, tmp_path: Path) -> None:
    for name, path in modules(PACKAGE).items():
        copy = tmp_path / path.relative_to(PACKAGE)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text() + (f"\n{line}\n" if name == "adapter" else ""))
    arrows = graph(tmp_path)
    assert [source for source, _ in upwards(arrows)] == ["adapter"]
    with pytest.raises(CycleError):
        TopologicalSorter(arrows).prepare()
