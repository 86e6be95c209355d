"""Plain-text tables."""

from __future__ import annotations

from bench.core import table


def test_table() -> None:
    text = table.render(("name", "us"), [("ring", "5"), ("a long name", "1234"), [], ["gloo: missing"]])
    assert text == "name           us\n-----------  ----\nring            5\na long name  1234\n\ngloo: missing"
