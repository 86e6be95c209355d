"""The report: nothing measured is lost, whatever its form, and the same results make the same page."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from bench import report
from bench.core import results

pytest.importorskip("matplotlib")


def test_every_number_is_on_the_page_with_where_it_comes_from(tmp_path: Path) -> None:
    """A benchmark without a picture is a table; words are escaped; twice the same bytes."""
    known = sorted(report.RESULTS.glob("allreduce-*.jsonl"))[:1]
    unknown = tmp_path / "other.jsonl"
    (run, _), *_ = results.read(known[0])
    row = {"type": "row", "contestant": "<b>&", "anything": 12.375, "samples": [1, 2]}
    results.append(unknown, [{**run, "bench": "bench.unknown", "command": "python -m bench.unknown --x '<'"}, row])
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for page in pages:
        assert report.main(["--html", str(page), *map(str, known), str(unknown)]) == 0
    text = pages[0].read_text()
    assert text == pages[1].read_text()
    assert "12.38" in text and "&lt;b&gt;&amp;" in text and "<b>" not in text
    assert "bench.unknown --x &#x27;&lt;&#x27;" in text and run["hardware"]["cpu"] in text
    for line, _ in results.read(known[0]):
        assert line["command"] in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text), "needs no other file"
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)\"", text)
    assert pictures and all(b"</svg>" in base64.b64decode(picture) for picture in pictures)
