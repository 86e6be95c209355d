"""Spans: off costs nothing and keeps nothing, on keeps the newest, and the file is what trace viewers read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commlab import trace


@pytest.fixture(autouse=True)
def _leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trace, "_spans", None)
    yield


def test_off_keeps_nothing() -> None:
    assert not trace.enabled()
    with trace.span("work"):
        trace.record("inner", "exchange", 1, 2)
    assert trace.dump() == b"[]"
    assert trace.span("one") is trace.span("other"), "off, a span is one shared object"


def test_spans_are_kept_in_order_with_what_was_said_about_them() -> None:
    trace.enable()
    assert trace.enabled()
    before_ns = time.time_ns()
    with trace.span("outer", bytes=12), trace.span("inner", "exchange"):
        time.sleep(0.002)
    trace.record("by hand", "exchange", 5_000, 7_500, peer=3)
    (inner, outer, by_hand) = json.loads(trace.dump())
    assert (inner[:2], inner[4]) == (["inner", "exchange"], {})
    assert (outer[:2], outer[4]) == (["outer", "compute"], {"bytes": 12})
    assert by_hand[3:] == [2_500, {"peer": 3}]
    # One span lies in the other, to the nanosecond, and both in this test.
    assert before_ns - 1_000_000 <= outer[2] <= inner[2] < inner[2] + inner[3] <= outer[2] + outer[3]
    assert outer[2] + outer[3] <= time.time_ns() + 1_000_000
    assert inner[3] >= 2_000_000


def test_a_span_is_kept_when_its_body_fails() -> None:
    trace.enable()
    with pytest.raises(ZeroDivisionError), trace.span("fails"):
        raise ZeroDivisionError
    assert json.loads(trace.dump())[0][0] == "fails"


def test_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "CAPACITY", 4)
    trace.enable()
    for at in range(11):
        trace.record(str(at), "exchange", at, at + 1)
    assert [span[0] for span in json.loads(trace.dump())] == ["7", "8", "9", "10"]


def test_threads_lose_no_span() -> None:
    trace.enable()
    many = 2000

    def work(lane: str) -> None:
        for at in range(many):
            trace.record(str(at), lane, at, at + 1)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = json.loads(trace.dump())
    for lane in "abcd":
        assert [int(span[0]) for span in spans if span[1] == lane] == list(range(many))


def test_the_file_has_one_process_per_rank_and_one_row_per_lane(tmp_path: Path) -> None:
    def dumped(rank: int) -> bytes:
        # As late as today: microseconds since 1970 would not leave a float room for these nanoseconds.
        start = 1_800_000_000_000_000_000 + 250 * rank
        return json.dumps(
            [["step", "compute", start, 1_000, {"rank": rank}], ["ring", "exchange", start + 100, 300, {}]]
        ).encode()

    trace.write(tmp_path / "trace.json", [dumped(0), dumped(1), b"[]"], {"ranks": 3})
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["otherData"] == {"ranks": 3}
    events = written["traceEvents"]
    names = {(event["pid"], event.get("tid")): event["args"]["name"] for event in events if event["ph"] == "M"}
    assert [names[rank, None] for rank in range(3)] == ["rank 0", "rank 1", "rank 2"]
    spans = {(event["pid"], names[event["pid"], event["tid"]]): event for event in events if event["ph"] == "X"}
    assert set(spans) == {(rank, lane) for rank in range(2) for lane in ("compute", "exchange")}
    assert [spans[rank, "compute"]["ts"] for rank in range(2)] == [0.0, 0.25]
    assert [spans[rank, "exchange"]["ts"] for rank in range(2)] == [0.1, 0.35]
    assert spans[1, "compute"]["dur"] == 1.0
    assert spans[1, "compute"]["args"] == {"rank": 1}


def test_an_empty_trace_can_be_written(tmp_path: Path) -> None:
    trace.write(tmp_path / "empty.json", [b"[]"])
    assert len(json.loads((tmp_path / "empty.json").read_text())["traceEvents"]) == 1
