"""Some hundred KB of several nodes by their leaders: the bits of hierarchical, what is counted, and where it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from closed_form import DTYPES, HALVES, ops_for, same_bits
from linked import Job, Mesh, Nodes, noise, on_all, reduced, right

import commlab
from commlab.collectives.plan import plan_of
from commlab.collectives.routes import hierarchical, leaders
from commlab.errors import SharedMemoryError
from commlab.native.library import built
from commlab.runtime import at_once as at_once_module
from commlab.runtime import leaders as leaders_module
from commlab.runtime.group import Group
from commlab.schedules import ALGORITHMS
from commlab.transport.tcp import TcpTransport, missing_reason
from commlab.window.area import Area

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())

FIRST = 0 if built is None else built.LINKS_FIRST_BYTES
FRAME = 0 if built is None else built.LINKS_FRAME_BYTES
LAYOUTS: dict[str, Nodes] = {
    "2 x 2": ((0, 1), (2, 3)),
    "2 x 3, dealt out": ((0, 2, 4), (1, 3, 5)),
    "3 x 2": ((0, 1), (2, 3), (4, 5)),
    "3 x 3": ((0, 1, 2), (3, 4, 5), (6, 7, 8)),
    "4 x 2, dealt out": ((0, 5), (1, 4), (2, 7), (3, 6)),
}


@pytest.fixture(params=LAYOUTS)
def job(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    # No slowness of the machine is to make anyone turn to the long way.
    monkeypatch.setattr(leaders_module, "LATE_S", 60.0)
    monkeypatch.setattr(at_once_module, "PATIENCE_US", 20e6)
    made = Job(LAYOUTS[request.param])
    yield made
    made.close()


def one_nan(tensor: torch.Tensor) -> torch.Tensor:
    """With one bit pattern for all NaNs: of two NaNs processors give either, as compilers order the operands."""
    if tensor.dtype.is_floating_point:
        tensor[tensor.isnan()] = float("nan")
    return tensor


def awkward(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that round, and, of those that have them, zeros of both signs, infinities and NaNs at places where other
    ranks have none, or have others."""
    mixed = noise(rank, numel, dtype)
    if dtype.is_floating_point:
        for at, special in enumerate((0.0, -0.0, float("inf"), float("-inf"), float("nan"))):
            mixed[(at + 3 * rank) % 11 :: 37] = special
    return mixed


def test_the_bits_of_hierarchical(job: Job) -> None:
    """By name, because that goes by the leaders whatever the length."""

    def one(group: Group) -> list[str]:
        wrong = []
        for dtype in DTYPES:
            most = group.leaders.area_bytes // dtype.itemsize if group.leaders is not None else 0
            for at, op in enumerate(ops_for(dtype)):
                for numel in (1, 17, 33, 1000, 20_011, most - at):
                    both = [awkward(group.rank, numel, dtype) for _ in range(2)]
                    commlab.allreduce(both[0], op, algorithm="hierarchical", group=group)
                    commlab.allreduce_async(both[1], op, algorithm="hierarchical", group=group).wait()
                    if not same_bits(*map(one_nan, both)):
                        wrong.append(f"{op} of {dtype}[{numel}]")
        return wrong

    assert job.all(one) == [[]] * job.size


@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_a_16_bit_wire(job: Job, wire: str) -> None:
    """What travels decides, not the tensor: twice as many numbers go by the leaders."""

    def one(group: Group) -> bool:
        numel = leaders_module.area_bytes(len(job.nodes[0])) // 2
        both = [noise(group.rank, numel, torch.float32) for _ in range(2)]
        commlab.allreduce(both[0], wire=wire, group=group)
        commlab.allreduce_async(both[1], wire=wire, group=group).wait()
        return same_bits(*both) and all(plan.at_once is not None for plan in group.plans.values())

    assert job.all(one) == [True] * job.size


def test_exact_and_counted(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody announces anything to everyone, and only leaders send."""
    monkeypatch.setattr(Group, "_queue", None)
    monkeypatch.setattr(TcpTransport, "launch", None)
    nodes, node_size = len(job.nodes), len(job.nodes[0])
    for dtype in DTYPES:
        op = next(op for op in ops_for(dtype) if not (dtype in HALVES and op == "mean"))
        most = leaders_module.area_bytes(node_size) // dtype.itemsize
        for numel in (leaders_module.LEADERS_BYTES // dtype.itemsize + 1, most):
            before = [(group.bytes_sent, group.messages_sent) for group in job.groups]
            results = job.all(lambda group, n=numel, d=dtype, o=op: reduced(group, n, d, o))
            assert all(right(each, job.size, numel, dtype, op) for each in results), (dtype, numel, op, results)
            sent = [group.bytes_sent - bytes_sent for group, (bytes_sent, _) in zip(job.groups, before, strict=True)]
            told = [group.messages_sent - messages for group, (_, messages) in zip(job.groups, before, strict=True)]
            # As by hierarchical: each number leaves its node once for its owner, and its owner once for each node.
            size_bytes = numel * dtype.itemsize
            assert sum(sent) == 2 * (nodes - 1) * size_bytes
            for rank in range(job.size):
                if rank not in job.leaders:
                    assert (sent[rank], told[rank]) == (0, 0)
                elif nodes == 2:
                    assert sent[rank] == size_bytes and told[rank] == 1 + -(-max(0, size_bytes - FIRST) // FRAME)
                else:
                    assert abs(sent[rank] - sum(sent) / nodes) <= 64 * nodes * node_size
                    share_bytes = size_bytes / nodes
                    frames = 1 + (share_bytes > FIRST) + (1 + (share_bytes > FRAME))
                    assert told[rank] == (nodes - 1) * frames, (rank, size_bytes)


def test_where_it_ends(job: Job) -> None:
    """Beyond what the leaders have room for all ranks carry a share, and that is what algorithm hierarchical does."""
    node_size = len(job.nodes[0])
    most = leaders_module.area_bytes(node_size) // 4
    assert most * 4 * node_size <= leaders_module.AREAS_BYTES < (most + 16) * 4 * node_size
    for numel, shortly in ((most, True), (most + 1, False)):
        assert all(right(each, job.size, numel) for each in job.all(lambda group, n=numel: reduced(group, n)))
        for group in job.groups:
            plan = plan_of(group, "allreduce", torch.empty(numel), "sum", None, "auto")
            assert (plan.chosen, plan.at_once is not None) == ("hierarchical", shortly)
            assert plan.route is (leaders if shortly else hierarchical)


@pytest.mark.parametrize("nodes", [2, 3, 4, 8])
@pytest.mark.parametrize("node_size", [2, 3])
@pytest.mark.parametrize(("numel", "itemsize"), [(1, 4), (31, 2), (33, 8), (1000, 4), (100_003, 4)])
def test_every_number_is_dealt_to_its_owner(nodes: int, node_size: int, numel: int, itemsize: int) -> None:
    dealt = leaders.deal(numel, nodes, node_size, itemsize)
    owner_of, place_of = {}, {}
    for piece in dealt.pieces:
        for offset in range(piece.numel):
            at = piece.at + offset
            place_of[piece.start + offset] = at
            owner_of[piece.start + offset] = next(who for who, share in enumerate(dealt.shares) if at in range(*share))
    assert sorted(place_of) == sorted(place_of.values()) == list(range(numel))
    for shard in hierarchical.shards(numel, node_size, itemsize):
        for owner, chunk in enumerate(ALGORITHMS["direct"].owners(shard.numel, nodes)):
            assert all(owner_of[shard.start + at] == owner for at in range(*chunk))


def test_another_algorithm_between_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds in another order, so the leaders don't."""
    monkeypatch.setattr(hierarchical, "algorithm_between", lambda *_: "ring")
    job = Job(LAYOUTS["3 x 2"])
    assert all(right(each, 6, 30_000) for each in job.all(lambda group: reduced(group, 30_000)))
    assert all(plan.at_once is None for group in job.groups for plan in group.plans.values())
    job.close()


def test_no_memory_for_the_leaders_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no rank has leaders, and all reduce as without."""
    made, lock, new_segment = [0], threading.Lock(), Area.new_segment

    def missing_once(area: Area, size_bytes: int) -> int:
        with lock:
            made[0] += 1
            if made[0] == 3:
                raise SharedMemoryError("no memory")
        return new_segment(area, size_bytes)

    monkeypatch.setattr(Area, "new_segment", missing_once)
    mesh = Mesh(4)
    groups = mesh.groups(nodes=LAYOUTS["2 x 2"])
    assert made[0] == 4 and all(group.leaders is None for group in groups)
    for numel in (5, 30_000):
        assert all(right(each, 4, numel) for each in on_all(groups, lambda group, n=numel: reduced(group, n)))
    on_all(groups, lambda group: group.close())
    mesh.close()
