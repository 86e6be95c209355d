"""The rooms of bench: imports go downwards, one command a file, and each says how it is used."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tree import BENCH_COMMANDS

import bench

HOME = Path(bench.__file__).parent
FILES = sorted(HOME.rglob("*.py"))
COMMANDS = sorted(file for file in HOME.glob("*.py") if file.stem != "__init__")

# From top to bottom: a room imports only from rows below its own, and from itself. Commands import no other command.
FLOORS = (
    "pictures",
    "training",
    "hosts",
    "contestants",
    "core",
)


def imports(file: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, path below bench) of every import out of bench, at any depth, for type checking too."""
    package = ("bench", *file.relative_to(HOME).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from ((node.lineno, tuple(name[1:])) for name in names if name[0] == "bench")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOME)))
def test_imports_go_downwards(file: Path) -> None:
    *room, _ = file.relative_to(HOME).parts
    for line, (other, *_) in imports(file):
        assert other in FLOORS, f"{file.name}:{line} imports {other}, which is no room"
        if room:
            assert FLOORS.index(other) >= FLOORS.index(room[0]), f"{file.name}:{line}: {room[0]} imports {other}"


def test_rooms_and_commands_are_these() -> None:
    """One file a command; data and a script beside."""
    assert {path.name for path in HOME.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        *FLOORS,
        "results",
    }
    assert {file.stem for file in COMMANDS} == BENCH_COMMANDS


@pytest.mark.parametrize("file", COMMANDS, ids=lambda file: file.stem)
def test_a_command_has_a_main_and_says_how_it_is_used(file: Path) -> None:
    tree = ast.parse(file.read_text())
    usage = ast.get_docstring(tree) or ""
    assert f"python -m bench.{file.stem}" in usage
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert isinstance(tree.body[-1], ast.If) and "main()" in ast.unparse(tree.body[-1])


def test_these_tests_see_something() -> None:
    assert len(FILES) > 40
    seen = {name for file in FILES for _, name in imports(file)}
    assert {("core", "results"), ("core", "harness", "Block"), ("hosts", "plan", "HostLink")} <= seen
