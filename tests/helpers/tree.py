"""The tree of folders that docs/design.md shows; ``python tests/helpers/tree.py`` prints it from the folders.

A folder is a line: its name, indented by its depth, and its Python files without ``.py``. A line that begins with no
folder goes on with the files of the one above it. ``__init__`` is there only where it holds more than a docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("commlab", "bench", "tests")
BENCH_COMMANDS = {
    *(
        "accuracy",
        "allreduce",
        "c10d",
        "cluster",
        "compare",
        "death",
        "fuzz",
        "horovod_build",
        "hvd",
        "overlap",
        "pack",
        "precision",
        "ps",
        "report",
    ),
    *("step", "straggler", "timeline", "train"),
}
"""The commands of bench, one file each."""
COLUMN = 20
WIDTH = 120

Tree = dict[str, set[str]]
"""The files of each folder, by the folder's path from the root."""


def _shown(file: Path) -> bool:
    if file.name != "__init__.py":
        return True
    return any(not isinstance(node, ast.Expr) for node in ast.parse(file.read_text()).body)


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    for inside in sorted(folder.iterdir()):
        if inside.is_dir() and not inside.name.startswith((".", "__")):
            yield from _folders(inside)


def tree_of_folders() -> Tree:
    return {
        str(folder.relative_to(ROOT)): {file.stem for file in folder.glob("*.py") if _shown(file)}
        for top in TOPS
        for folder in _folders(ROOT / top)
    }


def drawn(tree: Tree) -> str:
    """The tree as docs/design.md has it between its fences."""
    lines = []
    for folder, files in tree.items():
        head = "  " * folder.count("/") + folder.rpartition("/")[2] + "/"
        line = head.ljust(COLUMN)
        for file in sorted(files):
            if len(line) + len(file) > WIDTH:
                lines.append(line.rstrip())
                line = " " * COLUMN
            line += file + "  "
        lines.append(line.rstrip())
    return "\n".join(lines)


def parsed(text: str) -> Tree:
    """The reverse of :func:`drawn`. Files may stand in any order."""
    tree: Tree = {}
    path: list[str] = []
    for line in text.splitlines():
        first, *others = line.split()
        if first.endswith("/"):
            depth = (len(line) - len(line.lstrip())) // 2
            path = [*path[:depth], first.rstrip("/")]
            tree["/".join(path)] = set(others)
        else:
            tree["/".join(path)] |= {first, *others}
    return tree


def tree_of_page(page: str) -> Tree:
    """The tree that a page of Markdown shows: its fenced block that begins with ``commlab/``."""
    block = re.search(r"^```\w*\n(commlab/.*?)^```", page, re.S | re.M)
    assert block is not None, "no fenced block begins with commlab/"
    return parsed(block[1])


if __name__ == "__main__":
    print(drawn(tree_of_folders()))
