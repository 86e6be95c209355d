"""Few numbers of several nodes by their leaders: exact, the bits of the long way, and whatever goes wrong is told as
without leaders."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch
from closed_form import DTYPES, HALVES, numbers, ops_for, same_bits
from linked import Job, Mesh, Nodes, late_and_queued, noise, on_all, reduced, right

import commlab
from commlab.collectives.routes import piggyback
from commlab.errors import DisagreementError, RefusedError, UsageError
from commlab.runtime import at_once as at_once_module
from commlab.runtime import leaders as leaders_module
from commlab.runtime.group import Group
from commlab.runtime.leaders import LEADERS_BYTES
from commlab.transport.tcp import TcpTransport, missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())

LAYOUTS: dict[str, Nodes] = {
    "2 x 2": ((0, 1), (2, 3)),
    "3 and 1": ((0, 1, 2), (3,)),
    "1, 2 and 3": ((0,), (1, 2), (3, 4, 5)),
    "dealt out": ((0, 2, 4), (1, 3, 5)),
    "3 x 2": ((0, 1), (2, 3), (4, 5)),
}
MORE = 40_000
"""Numbers that no page holds: on nodes of equally many ranks they go by the leaders too."""


def layouts_and(few: int) -> pytest.MarkDecorator:
    """``few`` numbers on all layouts, and MORE where leaders take them."""
    cases = [*((name, few) for name in LAYOUTS), *((name, MORE) for name in ("2 x 2", "dealt out", "3 x 2"))]
    return pytest.mark.parametrize(("job", "numel"), cases, indirect=["job"])


layouts = pytest.mark.parametrize("job", LAYOUTS, indirect=True)


@pytest.fixture
def job(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    if "exact" in request.node.name:  # no slowness of the machine is to make anyone turn to the long way
        monkeypatch.setattr(leaders_module, "LATE_S", 60.0)
    made = Job(LAYOUTS[getattr(request, "param", "2 x 2")])
    yield made
    made.close()


@layouts
@pytest.mark.parametrize("patience_us", [20e6, 0.0])
def test_exact_and_counted(job: Job, monkeypatch: pytest.MonkeyPatch, patience_us: float) -> None:
    """Nobody announces anything to everyone, and only leaders send, also where the native call comes back before the
    end."""
    monkeypatch.setattr(Group, "_queue", None)
    monkeypatch.setattr(TcpTransport, "launch", None)
    monkeypatch.setattr(at_once_module, "PATIENCE_US", patience_us)
    others = len(job.nodes) - 1
    everything_bytes = piggyback.everything_bytes(job.groups[0].transport, others + 1)
    for dtype in DTYPES:
        sums_bytes = 4 if dtype in HALVES else dtype.itemsize
        most = LEADERS_BYTES // dtype.itemsize
        for at, numel in enumerate((1, min(most, everything_bytes // sums_bytes + 1), most - 1, most)):
            op = ops_for(dtype)[at % len(ops_for(dtype))]
            before = [(group.bytes_sent, group.messages_sent) for group in job.groups]
            results = job.all(lambda group, n=numel, d=dtype, o=op: reduced(group, n, d, o))
            assert all(right(each, job.size, numel, dtype, op) for each in results), (dtype, numel, op, results)
            shared = numel * sums_bytes > everything_bytes
            share_bytes = -(-numel // (others + 1)) * sums_bytes if shared else numel * sums_bytes
            messages = others * (2 if shared else 1)
            for group, (sent, told) in zip(job.groups, before, strict=True):
                want = (messages * share_bytes, messages) if group.rank in job.leaders else (0, 0)
                assert (group.bytes_sent - sent, group.messages_sent - told) == want, (group.rank, dtype, numel)


@layouts
def test_the_bits_of_the_long_way(job: Job) -> None:
    """Which way is taken may hang on the moment, and must not be seen in the numbers."""
    for dtype in DTYPES:
        for op in ops_for(dtype):
            for numel in (1, 33, 3001, LEADERS_BYTES // dtype.itemsize):

                def one(group: Group, n: int = numel, d: torch.dtype = dtype, o: str = op) -> list[torch.Tensor]:
                    at_once = commlab.allreduce(noise(group.rank, n, d), o, group=group)
                    return [at_once, commlab.allreduce_async(noise(group.rank, n, d), o, group=group).wait()]

                results = job.all(one)
                first = results[0][0]
                assert all(same_bits(each, first) for both in results for each in both), (dtype, op, numel)


def test_more_than_a_page_holds_and_wires(job: Job) -> None:
    numel = LEADERS_BYTES // 4 + 1
    assert all(right(each, 4, numel) for each in job.all(lambda group: reduced(group, numel)))

    def one(group: Group) -> torch.Tensor:
        return commlab.allreduce(torch.full((9,), float(group.rank + 1)), wire="fp16", group=group)

    assert [each.tolist() for each in job.all(one)] == [[2.5] * 9] * 4


@layouts_and(4000)
@pytest.mark.parametrize("patience_us", [1e5, 0.0])
def test_disagreement(job: Job, monkeypatch: pytest.MonkeyPatch, patience_us: float, numel: int) -> None:
    """On all ranks, with both sides, and the group goes on: what leaders have announced in vain is skipped."""
    monkeypatch.setattr(at_once_module, "PATIENCE_US", patience_us)
    for wrong in range(job.size):
        for result in job.all(lambda group, wrong=wrong: reduced(group, numel + (group.rank == wrong))):
            assert isinstance(result, DisagreementError), result
            for text in (f"float32[{numel}]", f"rank {wrong}: allreduce", f"float32[{numel + 1}]"):
                assert text in str(result)
        job.require_whole()


@layouts_and(3)
def test_other_operations_and_refusals(job: Job, numel: int) -> None:
    for wrong in range(job.size):

        def other(group: Group, wrong: int = wrong) -> object:
            return group.barrier() if group.rank == wrong else reduced(group, numel)

        for result in job.all(other):
            assert isinstance(result, DisagreementError) and "barrier" in str(result), result

        def refused(group: Group, wrong: int = wrong) -> object:
            ones = torch.ones(numel)
            return commlab.allreduce(ones.to_sparse() if group.rank == wrong else ones, group=group)

        for rank, result in enumerate(job.all(refused)):
            assert isinstance(result, UsageError if rank == wrong else RefusedError), result
            assert rank == wrong or f"rank {wrong}: allreduce" in str(result)
        job.require_whole()


@layouts_and(300)
@pytest.mark.parametrize("late_s", [0.0, 0.005, 0.12])
def test_one_rank_takes_the_long_way(job: Job, late_s: float, numel: int) -> None:
    """Because its program waits later, say. All turn to the long way, the next operation goes by the leaders again."""
    for other in range(job.size):

        def one(group: Group, other: int = other) -> list[torch.Tensor]:
            if group.rank != other:
                return [reduced(group, numel), reduced(group, 5)]
            time.sleep(late_s)
            handle = commlab.allreduce_async(numbers(group.rank, numel, torch.float32), "sum", group=group)
            return [handle.wait(), reduced(group, 5)]

        for results in job.all(one):
            assert isinstance(results, list), results
            assert right(results[0], job.size, numel) and right(results[1], job.size, 5)


@layouts_and(3000)
def test_a_late_rank_and_what_is_queued(job: Job, monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    monkeypatch.setattr(at_once_module, "PATIENCE_US", 1e3)

    for late in range(job.size):
        for late_s in (0.01, 0.1):
            for results in job.all(lambda group, at=late, for_s=late_s: late_and_queued(group, at, for_s, numel)):
                assert isinstance(results, list), results
                assert all(map(right, results, [job.size] * 3, [numel, 5, 200_000]))


@layouts
def test_any_mixture_of_ways(job: Job) -> None:
    """Each rank waits when it likes, for as long as it likes, and now and then does something that differs."""
    seed = random.Random(5)
    plan = [seed.choice(["few", "few", "few", "more", "barrier", "differ"]) for _ in range(150)]

    def one(group: Group) -> list[str]:
        mine, wrong = random.Random(group.rank), []
        for at, what in enumerate(plan):
            if mine.random() < 0.1:
                time.sleep(mine.random() * 0.004)
            if what == "barrier":
                group.barrier()
                continue
            numel = {"few": 17 + at, "more": MORE + at, "differ": 50 + at + (group.rank == at % group.size)}[what]
            tensor = numbers(group.rank, numel, torch.float32)
            try:
                if mine.random() < 0.2:
                    commlab.allreduce_async(tensor, "sum", group=group).wait()
                else:
                    commlab.allreduce(tensor, "sum", group=group)
            except DisagreementError:
                if what != "differ":
                    raise
                continue
            if what == "differ" or not right(tensor, group.size, numel):
                wrong.append(f"{what} {at}")
        return wrong

    results = job.all(one)
    assert results == [[]] * job.size, "\n".join(f"rank {rank}: {each!r}" for rank, each in enumerate(results))


def test_where_there_are_no_leaders() -> None:
    """A rank for each node, one node, or no check."""
    alone = Mesh(2)
    assert all(group.leaders is None for group in alone.groups(nodes=((0,), (1,))))
    unchecked = Mesh(3)
    groups = unchecked.groups(check=False, nodes=((0, 1), (2,)))
    assert all(group.leaders is None for group in groups)
    assert all(right(each, 3, 8) for each in on_all(groups, lambda group: reduced(group, 8)))
    for mesh in (alone, unchecked):
        mesh.close()
