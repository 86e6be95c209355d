"""The data of a collective: closed forms that hold, and that show every error."""

from __future__ import annotations

import pytest
import torch

from bench.contestants.case import DTYPES, EXACT_UP_TO, OPS, Case
from commlab.chunks import split
from commlab.errors import UsageError


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_data_and_closed_form(op: str, dtype: str, size: int) -> None:
    cases = [Case(op, 1003, DTYPES[dtype], rank, size, EXACT_UP_TO.get(dtype, 2**11)) for rank in range(size)]
    numel = cases[0].bytes // DTYPES[dtype].itemsize
    whole = torch.stack([case.source.double() for case in cases])
    total = whole.sum(0)
    assert float(total.max()) <= EXACT_UP_TO.get(dtype, 2**11)
    for rank, (case, own) in enumerate(zip(cases, split(numel, size), strict=True)):
        if op == "allreduce":
            result = total
        elif op == "reduce_scatter":
            result = total[own.start : own.stop]
        elif op == "allgather":
            result = torch.cat([whole[peer][chunk.start : chunk.stop] for peer, chunk in enumerate(split(numel, size))])
        else:
            result = whole[0]
        case.fill()
        assert case.wrong(result.to(case.dtype)) == 0
        assert case.wrong(result[1:].to(case.dtype)) == case.expected.numel()
        before = case.chunk if op == "reduce_scatter" else case.whole
        assert case.wrong(before) > 0 or size == 1 or (op, rank) == ("broadcast", 0)
        if op != "broadcast" and rank:
            assert (whole[rank] != whole[rank - 1]).all(), "differs per rank at every index"


def test_data_shows_what_goes_wrong() -> None:
    """Chunks swapped, shifted, added twice or not at all: each is seen at most of the indices that it touches."""
    cases = [Case("allreduce", 4000, torch.float32, rank, 4) for rank in range(4)]
    right = cases[0].expected
    first, second = right[:1000], right[1000:2000]
    assert cases[0].wrong(torch.cat([second, first, right[2000:]])) > 1900
    assert cases[0].wrong(right.roll(1)) > 3900
    for case in cases:
        assert case.wrong(right + case.source) > 3900 and case.wrong(right - case.source) > 3900
    assert cases[0].wrong(cases[0].whole) == 4000


def test_too_many_ranks_for_sixteen_bits() -> None:
    assert Case("allreduce", 5, torch.bfloat16, 22, 23, EXACT_UP_TO["bfloat16"]).expected.max() <= 256
    with pytest.raises(UsageError, match="24 ranks are too many"):
        Case("allreduce", 5, torch.bfloat16, 0, 24, EXACT_UP_TO["bfloat16"])
