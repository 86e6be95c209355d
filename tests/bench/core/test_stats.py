"""Sizes as text, bandwidths, and the ranges of ratios."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.core.stats import bus_factor, format_bytes, parse_bytes, percentile, ratio


def test_sizes() -> None:
    texts = {"4B": 4, "4": 4, "64KiB": 65536, "64k": 64000, "1MB": 10**6, "0.5 GB": 5 * 10**8, "100 MB": 10**8}
    assert {text: parse_bytes(text) for text in texts} == texts
    for text in ("", "MB", "1XB", "-4B", "1e3B", "4 B B"):
        with pytest.raises(ValueError, match="no size"):
            parse_bytes(text)


@given(st.integers(1, 10**12))
def test_exact_sizes_come_back(count: int) -> None:
    text = format_bytes(count)
    assert parse_bytes(text) == count or text == f"{count / 1e6:.3f}MB"


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert bus_factor("allreduce", 8) == 2 * 7 / 8
    assert bus_factor("reduce_scatter", 8) == bus_factor("allgather", 8) == 7 / 8
    assert bus_factor("broadcast", 8) == 1
    assert percentile([3.0, 1.0, 2.0], 50) == 2 and percentile([3.0, 1.0, 2.0], 99) == 3


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_the_range_of_a_ratio_holds_its_median(samples: list[float]) -> None:
    found = ratio(samples, [1.0] * len(samples))
    assert found.low <= found.median <= found.high
    assert len(samples) > 5 or (found.low, found.high) == (min(samples), max(samples))


@pytest.mark.parametrize("rounds", [6, 7, 9, 11, 21, 40])
def test_the_range_holds_the_true_median_as_often_as_it_says(rounds: int) -> None:
    """Against the binomial distribution, and on lopsided noise with a common factor per round, which must cancel."""
    draw = random.Random(rounds)
    held, trials = 0, 2000
    for _ in range(trials):
        weather = [math.exp(draw.gauss(0, 2)) for _ in range(rounds)]
        noise = [draw.expovariate(math.log(2)) for _ in range(rounds)]  # its median is 1
        found = ratio([each * rain for each, rain in zip(noise, weather, strict=True)], weather)
        held += found.low <= 1 <= found.high
    # 95 %, less four standard deviations of 2000 trials.
    assert held / trials >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials)
