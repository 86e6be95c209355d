"""bench.straggler: the records of its runs."""

from __future__ import annotations

import pytest

from bench import straggler


def ended(tokens_per_s: float, bits: float) -> straggler.Outcome:
    return straggler.Outcome(tokens_per_s, bits, "0: 100.0%", "5 5")


def test_a_straggler_is_measured_against_bsp() -> None:
    """Round by round; and asp may cost a tenth of the loss, no more."""
    options = straggler.PROGRAM.parser().parse_args(["--rows", "bsp,asp"])
    found = {
        "bsp": [ended(100, 3.0), ended(50, 3.0), ended(200, 3.0)],
        "asp": [ended(300, 3.2), ended(50, 3.1), ended(500, 3.4)],
    }
    bsp, asp = straggler.records(found, options)
    assert bsp["speed_of_bsp"][0] == 1 and asp["speed_of_bsp"] == [2.5, 1.0, 3.0]
    assert asp["loss_of_bsp"] == pytest.approx(3.2 / 3.0, rel=1e-3) and not asp["wrong"]
    found["asp"] = [ended(300, 3.4)] * 3
    assert straggler.records(found, options)[1]["wrong"]


def test_staleness_in_short() -> None:
    assert straggler.spread("0: 100.0%") == "median 0, most 0"
    assert straggler.spread("0: 18.0%, 1: 30.1%, 7: 50.0%, 81: 1.9%") == "median 7, most 81"
