"""A schedule as a picture: ranks from left to right, steps from top to bottom, an arrow for each message."""

from __future__ import annotations

from pictures import steps_of, timeline

from commlab.chunks import Range

COLUMN, ROW, LEFT, TOP = 150, 62, 70, 46
STYLE = (
    "text{font:13px sans-serif;fill:#666} .lane{stroke:#bbb} .add{stroke:#3f51b5} .copy{stroke:#2e9e5b}"
    " .add,.copy{stroke-width:1.6;fill:none} .label{font-size:11px} .addlabel{fill:#3f51b5} .copylabel{fill:#2e9e5b}"
)
MARKER = (
    '<marker id="{0}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" fill="{1}"/></marker>'
)


def _words(part: Range) -> str:
    return str(part.start) if part.numel == 1 else f"{part.start}-{part.stop - 1}"


def svg(name: str, size: int) -> str:
    """An allreduce of as many numbers as ranks. Blue arrows are added at their end, green ones written."""
    rows = timeline(steps_of(name, size, size))
    width, height = LEFT + COLUMN * (size - 1) + 70, TOP + ROW * len(rows) + 40
    x = [LEFT + COLUMN * rank for rank in range(size)]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>allreduce by {name} on {size} ranks</title><style>{STYLE}</style><defs>",
        MARKER.format("add", "#3f51b5") + MARKER.format("copy", "#2e9e5b") + "</defs>",
    ]
    for rank in range(size):
        out.append(f'<text x="{x[rank]}" y="20" text-anchor="middle">rank {rank}</text>')
        out.append(f'<path class="lane" d="M{x[rank]} {TOP - 14}V{height - 30}"/>')
    for at, row in enumerate(rows):
        top = TOP + ROW * at
        out.append(f'<text x="8" y="{top + ROW / 2:.0f}">{at}</text>')
        for rank, item in row.items():
            if item.frm is None:
                continue
            kind = "add" if item.reduce else "copy"
            start, end = x[item.frm], x[rank]
            # A label sits a third of the way along, on its own side: two arrows that cross do not hide each other's.
            along = 0.3
            label_x, label_y = start + (end - start) * along, top + (ROW - 10) * along
            out.append(f'<path class="{kind}" marker-end="url(#{kind})" d="M{start} {top}L{end} {top + ROW - 10}"/>')
            out.append(
                f'<text class="label {kind}label" x="{label_x + (7 if end > start else -7):.0f}" y="{label_y - 3:.0f}" '
                f'text-anchor="{"start" if end > start else "end"}">{_words(item.recv)}</text>'
            )
    out.append(f'<text class="addlabel" x="8" y="{height - 8}">number is added</text>')
    out.append(f'<text class="copylabel" x="130" y="{height - 8}">number is written</text></svg>')
    return "\n".join(out)
