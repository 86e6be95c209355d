"""Offset arithmetic: nothing lost, nothing twice, for any sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlab.chunks import EMPTY, Range, segments, span, split, whole_at

small = st.integers(0, 300)


def covers(ranges: list[Range] | tuple[Range, ...], whole: Range) -> bool:
    """Whether the ranges adjoin, ascend, and cover ``whole`` exactly."""
    at = whole.start
    for part in ranges:
        if part.start != at or part.stop < part.start:
            return False
        at = part.stop
    return at == whole.stop


@given(numel=small, parts=st.integers(1, 40), align=st.integers(1, 20))
def test_split(numel: int, parts: int, align: int) -> None:
    chunks = split(numel, parts, align)
    assert len(chunks) == parts
    assert covers(chunks, Range(0, numel))
    assert all(chunk.stop % align == 0 or chunk.stop == numel for chunk in chunks)
    units = [-(-chunk.numel // align) for chunk in chunks]
    assert max(units) - min(units) <= 1
    assert units == sorted(units, reverse=True), "the first chunks are the longer ones"


def test_split_by_hand() -> None:
    assert split(10, 4) == ((0, 3), (3, 6), (6, 8), (8, 10))
    assert split(2, 4) == ((0, 1), (1, 2), (2, 2), (2, 2))
    assert split(9, 2, align=4) == ((0, 8), (8, 9))
    assert split(0, 2) == (EMPTY, EMPTY)


@given(numel=small, parts=st.integers(1, 20), data=st.data())
def test_whole_at(numel: int, parts: int, data: st.DataObject) -> None:
    owner = data.draw(st.integers(0, parts - 1))
    chunks = whole_at(owner, numel, parts)
    assert covers(chunks, Range(0, numel))
    assert [chunk.numel for chunk in chunks] == [numel if part == owner else 0 for part in range(parts)]


@given(start=small, numel=small, segment_numel=st.integers(1, 50))
def test_segments(start: int, numel: int, segment_numel: int) -> None:
    chunk = Range(start, start + numel)
    cut = segments(chunk, segment_numel)
    assert covers(cut, chunk)
    assert all(0 < each.numel <= segment_numel for each in cut)
    assert all(each.numel == segment_numel for each in cut[:-1]), "only the last one may be ragged"


@given(numel=small, parts=st.integers(1, 20), data=st.data())
def test_span(numel: int, parts: int, data: st.DataObject) -> None:
    chunks = split(numel, parts)
    first = data.draw(st.integers(0, parts - 1))
    last = data.draw(st.integers(first + 1, parts))
    assert covers(chunks[first:last], span(chunks, first, last))


@given(first=st.tuples(small, small), second=st.tuples(small, small))
def test_ranges_are_sets(first: tuple[int, int], second: tuple[int, int]) -> None:
    one, other = Range(*sorted(first)), Range(*sorted(second))
    common = set(range(*one)) & set(range(*other))
    assert set(range(*one.intersect(other))) == common
    assert one.intersect(other).numel == len(common)
    if one.numel and other.numel:
        assert one.overlaps(other) == other.overlaps(one) == bool(common)


@pytest.mark.parametrize("empty", [Range(5, 5), EMPTY])
def test_an_empty_range_overlaps_nothing_that_begins_or_ends_there(empty: Range) -> None:
    for other in (Range(0, empty.start), Range(empty.stop, empty.stop + 3), empty):
        assert not empty.overlaps(other)
        assert not other.overlaps(empty)
