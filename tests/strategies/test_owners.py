"""Every number of a bucket has one owner, and owners know their pieces."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from commlab.gradients.bucket import plan
from commlab.gradients.parameters import NamedParameter
from commlab.strategies.owners import SERVER, all_owners, one_owner, owned


@given(numels=st.lists(st.integers(0, 90), min_size=1, max_size=12), ranks=st.integers(1, 9), sharded=st.booleans())
def test_every_number_is_owned_once(numels: list[int], ranks: int, sharded: bool) -> None:
    parameters = [
        NamedParameter(f"p{index}", torch.nn.Parameter(torch.zeros(numel)), 0, index)
        for index, numel in enumerate(numels)
    ]
    (bucket,) = plan(parameters, 10**6, None)
    chunks = (all_owners if sharded else one_owner)(bucket.numel, ranks)
    assert len(chunks) == ranks and sum(chunk.numel for chunk in chunks) == bucket.numel
    owners = torch.zeros(bucket.numel, dtype=torch.int64)
    extents = dict(zip((member.name for member in bucket.parameters), bucket.ranges, strict=True))
    for rank, chunk in enumerate(chunks):
        assert sharded or rank == SERVER or not chunk.numel
        assert not sharded or chunk.start % 16 == 0 or chunk.start == bucket.numel, "cut between cache lines"
        for item in owned(bucket, chunk):
            assert item.stop - item.start == item.in_chunk.numel > 0
            start = chunk.start + item.in_chunk.start
            assert start - extents[item.parameter.name].start == item.start
            owners[start : start + item.in_chunk.numel] += 1
    assert (owners == 1).all()
