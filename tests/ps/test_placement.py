"""Shards: every number has one owner, owners are balanced by bytes, and small tensors travel together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commlab.errors import UsageError
from commlab.ps.messages import MESSAGE_BYTES
from commlab.ps.placement import Entry, deal, server_ranks
from commlab.ps.server.shard import Shard

SHAPES = st.lists(
    st.integers(0, 3).map(lambda size: (0, 1, 70, 5000)[size]) | st.integers(0, 2000), min_size=1, max_size=30
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@given(sizes=SHAPES, servers=st.integers(1, 6))
def test_every_number_has_exactly_one_owner(sizes: list[int], servers: int) -> None:
    entries = [Entry(str(at), (size,), DTYPES[size % 3]) for at, size in enumerate(sizes)]
    placement = deal(entries, servers)
    for entry, slices in zip(entries, placement.of_entry, strict=True):
        numbers = [number for owned in slices for number in range(owned.start, owned.stop)]
        assert sorted(numbers) == list(range(entry.numel))
    for server, slices in enumerate(placement.of_server):
        assert [owned.number for owned in slices] == list(range(len(slices)))
        assert all(owned.server == server for owned in slices)
        assert sorted(owned.entry for owned in slices) == [owned.entry for owned in slices], "in forward order"
        for dtype in DTYPES:
            at = 0
            for owned in slices:
                if entries[owned.entry].dtype == dtype:
                    assert owned.offset == at, "adjoining"
                    at += owned.numel
    assert sum(placement.bytes_per_server) == sum(entry.nbytes for entry in entries)


def gpt2(width: int, layers: int, vocabulary: int) -> list[Entry]:
    shapes: list[tuple[str, tuple[int, ...]]] = [("wte", (vocabulary, width)), ("wpe", (1024, width))]
    for layer in range(layers):
        block = {"ln": (width,), "ln.b": (width,), "attn": (width, 3 * width), "attn.b": (3 * width,)}
        block |= {"proj": (width, width), "proj.b": (width,), "fc": (width, 4 * width), "fc.b": (4 * width,)}
        shapes += [(f"h.{layer}.{name}", shape) for name, shape in block.items()]
    return [Entry(name, shape, torch.float32) for name, shape in shapes]


@pytest.mark.parametrize("servers", [2, 3, 4, 7])
@pytest.mark.parametrize(("width", "layers", "vocabulary"), [(768, 12, 26679), (128, 4, 257), (48, 2, 257)])
def test_servers_of_a_gpt2_differ_by_little(width: int, layers: int, vocabulary: int, servers: int) -> None:
    placement = deal(gpt2(width, layers, vocabulary), servers)
    assert placement.imbalance < (0.002 if width == 768 else 0.04), placement.describe()
    assert all(owned.numel * 4 <= MESSAGE_BYTES for slices in placement.of_server for owned in slices)


def test_small_tensors_travel_in_groups() -> None:
    placement = deal(gpt2(768, 12, 26679), 4)
    for layer in range(12):
        small = [at for at, entry in enumerate(placement.entries) if entry.name in (f"h.{layer}.ln", f"h.{layer}.ln.b")]
        owners = {owned.server for at in small for owned in placement.of_entry[at]}
        assert len(owners) == 1
    first = placement.of_entry[0]
    assert {owned.server for owned in first} == {0, 1, 2, 3}, "the embedding is on all of them"


def test_a_shard_updates_only_what_it_is_told_to() -> None:
    entries = [Entry("a", (3,), torch.float32), Entry("b", (), torch.float32, 1), Entry("c", (2, 2), torch.float32)]
    shard = Shard(deal(entries, 1), 0, lambda groups: torch.optim.SGD(groups, lr=1.0, weight_decay=0.5), 2)
    for value in shard.values.values():
        value.fill_(1.0)

    def update(numbers: dict[int, torch.Tensor], hypers: list[dict[str, float]] | None) -> None:
        shard.update([(span, numbers[span.first]) for span in shard.spans(numbers)], hypers)

    update({1: torch.tensor([2.0])}, None)
    assert [piece.flatten().tolist() for piece in shard.pieces] == [[1.0] * 3, [-1.5], [1.0] * 4]
    update({0: torch.zeros(3), 2: torch.ones(4)}, [{"lr": 2.0}, {"lr": 7.0}])
    assert [piece.flatten().tolist() for piece in shard.pieces] == [[0.0] * 3, [-1.5], [-2.0] * 4]
    assert shard.pieces[1].shape == () and all(piece.grad is None for piece in shard.pieces)


@pytest.mark.parametrize(
    ("nodes", "servers", "wanted"),
    [
        ([[0, 1]], 1, (1,)),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], 3, (5, 6, 7)),
        ([[0], [1], [2], [3]], 1, (3,)),
        ([[0], [1], [2], [3]], 3, (1, 2, 3)),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 2, (3, 7)),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 3, (3, 6, 7)),
        ([[0], [1, 2, 3]], 2, (2, 3)),
    ],
)
def test_servers_are_spread_over_nodes(nodes: list[list[int]], servers: int, wanted: tuple[int, ...]) -> None:
    assert server_ranks(nodes, servers) == wanted


@pytest.mark.parametrize("servers", [0, 4, 5])
def test_somebody_has_to_train(servers: int) -> None:
    with pytest.raises(UsageError, match=rf"{servers} servers among 4 ranks.*give 1 to 3 servers"):
        server_ranks([[0, 1], [2, 3]], servers)
