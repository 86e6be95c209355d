"""Plain-text tables: columns as wide as what is in them, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence


def render(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """``left``: columns of words. A row of one cell runs over the whole width; an empty row is an empty line."""
    cells = [row for row in rows if len(row) == len(head)]
    widths = [max(len(row[at]) for row in [head, *cells]) for at in range(len(head))]

    def line(row: Sequence[str]) -> str:
        if len(row) != len(head):
            return "  ".join(row)
        padded = (
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])
