"""Allreduces that were made before, which native code does from the caller on: it must not take one call for another,
and whatever it can't do goes the long way as if it were not there."""

from __future__ import annotations

import gc
import importlib
import mmap
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from linked import Mesh, on_all

import commlab
from commlab import trace
from commlab.collectives import known
from commlab.errors import UsageError
from commlab.runtime.group import Group
from commlab.transport.tcp import missing_reason

pytestmark = [
    pytest.mark.skipif(bool(missing_reason()), reason=missing_reason()),
    pytest.mark.skipif(known._native is None, reason="torch before 2.10 tells nobody what a tensor is"),
]
SIZE = 3


@pytest.fixture
def groups() -> Iterator[list[Group]]:
    mesh = Mesh(SIZE)
    yield mesh.groups()
    mesh.close()


def numbers(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Distinct by rank and place, and exact in every dtype."""
    return (torch.arange(torch.Size(shape).numel()) % 7 + 2 * rank + 1).to(dtype).reshape(shape)


def wanted(op: str, shape: tuple[int, ...]) -> torch.Tensor:
    every = torch.stack([numbers(rank, shape, torch.float64) for rank in range(SIZE)])
    found = {"sum": every.sum(0), "mean": every.mean(0), "max": every.amax(0), "min": every.amin(0)}.get(op)
    return every.prod(0) if found is None else found


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that Python has looked up or worked out."""
    module, calls = importlib.import_module("commlab.collectives.allreduce"), list[Any]()
    plan_of = module.plan_of

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return plan_of(*arguments)

    monkeypatch.setattr(module, "plan_of", noted)
    return calls


def require_same(results: list[Any], want: Any) -> None:
    for result in results:
        assert result == want, results


def test_a_call_is_known_by_all_that_tells_it_from_others(groups: list[Group], planned: list[Any]) -> None:
    calls: list[tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = [
        (shape, dtype, {"op": op, **more})
        for shape in ((), (1,), (6,), (2, 3), (3, 2), (1, 6, 1))
        for dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.bfloat16, torch.float16)
        for op in ("sum", "max", "mean", "prod")[: 4 if dtype.is_floating_point else 2]
        for more in ({}, {"name": "loss"}, {"algorithm": "direct"})
    ]

    def one(group: Group) -> bool:
        for shape, dtype, arguments in calls:
            mine = numbers(group.rank, shape, dtype)
            address, version = mine.data_ptr(), mine._version
            result = commlab.allreduce(mine, group=group, **arguments)
            assert result is mine and mine.data_ptr() == address and mine._version > version
            want = wanted(arguments["op"], shape)
            # Small integers: sums and products are exact, a mean of three is rounded once.
            assert torch.equal(mine, want.to(torch.float32).to(dtype)), (mine, want, arguments)
        return True

    require_same(on_all(groups, one), True)
    assert len(planned) == SIZE * len(calls) and all(len(group.known_calls) == len(calls) for group in groups)
    planned.clear()
    for _ in range(2):
        require_same(on_all(groups, one), True)
    assert not planned


def _transposed(rank: int) -> torch.Tensor:
    """One rank's numbers lie in a row: their order in memory is not that of the others."""
    return numbers(rank, (2, 3)) if rank == 1 else numbers(rank, (2, 3)).t().contiguous().t()


def _negated(rank: int) -> torch.Tensor:
    return torch._neg_view(-numbers(rank, (2, 3)))


def _part(rank: int) -> torch.Tensor:
    whole = torch.zeros(2, 4)
    whole[:, :3] = numbers(rank, (2, 3))
    return whole[:, :3]


@pytest.mark.parametrize("other", [_transposed, _negated, _part])
def test_what_does_not_lie_in_a_row(groups: list[Group], other: Callable[[int], torch.Tensor]) -> None:
    def one(group: Group) -> bool:
        for _ in range(2):
            for mine in (numbers(group.rank, (2, 3)), other(group.rank)):
                assert torch.equal(commlab.allreduce(mine, "max", group=group), wanted("max", (2, 3)).float())
        return True

    require_same(on_all(groups, one), True)


def test_a_tensor_that_has_become_another(groups: list[Group]) -> None:
    """The same object, in other memory, of another shape, with a gradient's history."""

    def one(group: Group) -> bool:
        mine = numbers(group.rank, (6,))
        commlab.allreduce(mine, "sum", group=group)
        for _ in range(2):
            mine.data = numbers(group.rank, (6,))
            assert torch.equal(commlab.allreduce(mine, "sum", group=group), wanted("sum", (6,)).float())
            mine.data = numbers(group.rank, (2, 3))
            assert torch.equal(commlab.allreduce(mine, "sum", group=group), wanted("sum", (2, 3)).float())
            mine.resize_(4).copy_(numbers(group.rank, (4,)))
            assert torch.equal(commlab.allreduce(mine, "sum", group=group), wanted("sum", (4,)).float())
        leaf = torch.ones(6, requires_grad=True)
        squared = leaf * leaf
        parameter = torch.nn.Parameter(numbers(group.rank, (6,)))
        for _ in range(2):
            commlab.allreduce(parameter.data.copy_(numbers(group.rank, (6,))), "sum", group=group)
            with torch.no_grad():
                parameter.copy_(numbers(group.rank, (6,)))
            commlab.allreduce(parameter, "sum", group=group)
            assert torch.equal(parameter.detach(), wanted("sum", (6,)).float()) and parameter.requires_grad
            commlab.allreduce(squared, "sum", group=group)
        (squared * squared).sum().backward()
        commlab.allreduce(leaf.data, "sum", group=group)
        return True

    require_same(on_all(groups, one), True)


def test_autograd_is_told(groups: list[Group]) -> None:
    def one(group: Group) -> str:
        commlab.allreduce(torch.ones(5), "sum", group=group)
        value = torch.ones(5, requires_grad=True).exp()
        total = (value * value).sum()
        commlab.allreduce(value.detach(), "sum", group=group)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        return "raised"

    require_same(on_all(groups, one), "raised")


def test_memory_that_may_only_be_read(groups: list[Group], tmp_path: Any) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(mmap.PAGESIZE))

    def one(group: Group) -> str:
        for _ in range(2):
            commlab.allreduce(torch.zeros(mmap.PAGESIZE // 4), "sum", group=group)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with pytest.raises(UsageError, match="may only be read"):
            commlab.allreduce(torch.frombuffer(memoryview(mapped), dtype=torch.float32), "sum", group=group)
        return "refused"

    with pytest.warns(UserWarning, match="not writable"):
        require_same(on_all(groups, one), "refused")


def test_inside_of_transforms_it_is_refused(groups: list[Group]) -> None:
    def one(group: Group) -> str:
        for _ in range(2):
            commlab.allreduce(torch.zeros(3), "sum", group=group)

        def inside(row: torch.Tensor) -> torch.Tensor:
            return commlab.allreduce(row, "sum", group=group)

        with pytest.raises(UsageError, match="can't be reached"):
            torch.vmap(inside)(torch.zeros(2, 3))
        return "refused"

    require_same(on_all(groups, one), "refused")


def test_a_trace_sees_it(groups: list[Group]) -> None:
    on_all(groups, lambda group: commlab.allreduce(torch.ones(3), "sum", group=group))
    before = [len(group.known_calls) for group in groups]
    trace.enable()
    try:
        results = on_all(groups, lambda group: commlab.allreduce(torch.ones(3), "sum", group=group).tolist())
        assert b"allreduce" in trace.dump()
    finally:
        trace.disable()
    require_same(results, [float(SIZE)] * 3)
    assert [len(group.known_calls) for group in groups] == before == [1] * SIZE


def test_names_without_end(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """A new name for each call, as text of its own each time: as many calls are kept as there is room for."""
    monkeypatch.setattr(known, "_KNOWN_CALLS", 16)

    def one(group: Group) -> bool:
        for number in range(50):
            mine = commlab.allreduce(numbers(group.rank, (4,)), "sum", name=f"gradient {number}", group=group)
            assert torch.equal(mine, wanted("sum", (4,)).float())
        return len(group.known_calls) <= 16

    require_same(on_all(groups, one), True)


def test_ranks_that_know_different_calls(groups: list[Group]) -> None:
    """Each rank knows both; they disagree, with both sides, and go on."""

    def both(group: Group) -> None:
        for numel in (4, 5):
            commlab.allreduce(torch.ones(numel), "sum", group=group)

    on_all(groups, both)

    def one(group: Group) -> bool:
        with pytest.raises(commlab.DisagreementError) as raised:
            commlab.allreduce(torch.ones(4 + (group.rank == 1)), "sum", group=group)
        both(group)
        return "float32[4]" in str(raised.value) and "float32[5]" in str(raised.value)

    require_same(on_all(groups, one), True)


def test_a_group_that_is_shut_down_is_given_back(groups: list[Group]) -> None:
    """What is known of its calls keeps no group alive, and does nothing for one that has ended."""
    mesh = Mesh(2)
    mine = mesh.groups()
    for _ in range(2):
        on_all(mine, lambda group: commlab.allreduce(torch.ones(3), "sum", group=group))
    assert all(group.known_calls for group in mine)
    on_all(mine, lambda group: group.close())
    for group in mine:
        assert not group.known_calls
        with pytest.raises(UsageError, match="shut down"):
            commlab.allreduce(torch.ones(3), "sum", group=group)
    ended = [weakref.ref(group) for group in mine]
    mesh.close()
    del mine, mesh, group
    gc.collect()
    assert [each() for each in ended] == [None, None]
