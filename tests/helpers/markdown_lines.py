"""No line of Markdown has more than 120 characters: ``python tests/helpers/markdown_lines.py`` names those that have.

A row of a table cannot be broken, and may be longer; all other lines can, those of code and of lists too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 120


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "bench").rglob("*.md"))]


def long_lines(page: Path) -> Iterator[str]:
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if len(line) > WIDTH and not line.lstrip().startswith("|"):
            yield f"{page.relative_to(ROOT)}:{number}: {len(line)} characters, more than {WIDTH}"


if __name__ == "__main__":
    found = [line for page in pages() for line in long_lines(page)]
    print("\n".join(found) or f"{len(pages())} pages: no line has more than {WIDTH} characters")
    sys.exit(bool(found))
