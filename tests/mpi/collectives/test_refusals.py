"""Arguments that one rank refuses: the same error on every rank at once, nobody waits, and the group goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closed_form import expected, numbers
from mpi_ranks import Ranks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import commlab
from commlab.errors import RefusedError
from commlab.runtime.group import Group

pytestmark = pytest.mark.mpi(min_size=2)


class Wrapped(torch.Tensor):
    """Stands for another tensor, as DTensor and its like do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def read_only() -> torch.Tensor:
    """A file mapped for reading: a write would end the process."""
    file = Path(f"/tmp/commlab-test-{np.random.default_rng().integers(2**62)}")
    file.write_bytes(bytes(4096))
    try:
        mapped = np.memmap(file, mode="r", dtype=np.float32, shape=(6,))
    finally:
        file.unlink()
    return torch.from_numpy(mapped)


NO_TENSORS: dict[str, tuple[Callable[[], object], str]] = {
    "numpy": (lambda: np.zeros(6, np.float32), "a ndarray: that is no tensor"),
    "none": (lambda: None, "a NoneType: that is no tensor"),
    "sparse": (lambda: torch.eye(6).to_sparse(), r"a sparse_coo tensor is not one dense block"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor is not one"),
    "meta": (lambda: torch.zeros(6, device="meta"), "device meta has no numbers"),
    "wrapper": (lambda: Wrapped(torch.zeros(6)), "a Wrapped stands for other tensors"),
    "lazy": (lambda: torch.nn.UninitializedParameter(), "an? UninitializedParameter has no numbers yet"),
}
NOT_WRITTEN: dict[str, tuple[Callable[[], object], str]] = {
    "expanded": (lambda: torch.ones(1).expand(6), "share one place in memory"),
    "overlapping": (lambda: torch.ones(4).as_strided((3, 2), (1, 1)), "share one place in memory"),
    "read-only": (read_only, "its memory may only be read"),
}
DTYPES: dict[str, tuple[Callable[[], object], str]] = {
    "bool": (lambda: torch.ones(6, dtype=torch.bool), r"bool\[6\]: dtypes are float32"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(6), 1.0, 0, torch.quint8), r"quint8\[6\]: dtypes are"),
}


def groups_of(ranks: Ranks) -> list[Group]:
    """The window and its shortest way; and halves, which send messages that carry numbers."""
    # Where halves have one rank each, nobody else has to be told.
    return [ranks.world, ranks.halves(ranks.size // 2)] if ranks.size >= 4 else [ranks.world]


def all_are_told(group: Group, odd: int, call: Callable[[], object], words: str) -> None:
    """``call()`` raises the odd rank's reason on all ranks, soon, and the group goes on."""
    started_s = time.perf_counter()
    with pytest.raises(RefusedError, match=rf"rank {odd}: .*({words})") as caught:
        call()
    assert isinstance(caught.value, commlab.UsageError | commlab.DisagreementError)
    assert time.perf_counter() - started_s < 20
    assert "Nothing was reduced" in str(caught.value)
    usual = numbers(group.rank, 6, torch.float32)
    assert torch.equal(commlab.allreduce(usual, "sum", group=group), expected("sum", group.size, 6, torch.float32))


def refused_tensors(group: Group, case: str) -> None:
    make, words = {**NO_TENSORS, **NOT_WRITTEN, **DTYPES}[case]
    odd = group.size - 1
    part = torch.zeros(6 // group.size + (group.rank < 6 % group.size))

    def x() -> Any:
        return make() if group.rank == odd else numbers(group.rank, 6, torch.float32)

    rows = torch.zeros(group.size, 6)

    def square() -> Any:
        return make() if group.rank == odd else rows.clone()

    def outs() -> Any:
        return [part.clone() for _ in range(group.size - 1)] + [make()] if group.rank == odd else None

    calls: list[Callable[[], object]] = [
        lambda: commlab.allreduce(x(), "sum", group=group),
        lambda: commlab.allreduce(x(), "sum", algorithm="tree", group=group),
        lambda: commlab.allreduce_async(x(), "sum", group=group).wait(),
        lambda: commlab.reduce(x(), odd, "sum", group=group),
    ]
    if case not in DTYPES:
        calls += [lambda: commlab.broadcast(x(), group=group)]
    if case in NO_TENSORS:
        calls += [
            lambda: commlab.reduce_scatter(part, x(), group=group),
            lambda: commlab.allgather(x(), part, group=group),
            lambda: commlab.allgather_parts(x(), group=group),
            lambda: commlab.alltoall(rows.clone(), square(), group=group),
            lambda: commlab.gather([part.clone() for _ in range(group.size)], x(), group=group),
            lambda: commlab.scatter(part, [x()] * group.size, odd, group=group),
        ]
    else:
        calls += [lambda: commlab.grouped_allreduce([part.double(), x()], "sum", group=group)]
    if case not in DTYPES:
        calls += [
            lambda: commlab.alltoall(square(), rows.clone(), group=group),
            lambda: commlab.gather(outs(), part, odd, group=group),
            lambda: commlab.scatter(x(), [part] * group.size, group=group),
        ]
    for call in calls:
        all_are_told(group, odd, call, words)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [*NO_TENSORS, *NOT_WRITTEN, *DTYPES])
def test_a_tensor_that_one_rank_has(ranks: Ranks, case: str) -> None:
    """B18: what one rank's tensor can't do is told to all, by every operation that it concerns."""
    for group in groups_of(ranks):
        refused_tensors(group, case)


RECORDERS: dict[str, Callable[[Callable[..., Any], torch.Tensor], object]] = {
    "torch.jit.trace": lambda call, x: torch.jit.trace(call, x, check_trace=False),
    "make_fx": lambda call, x: make_fx(call)(x),
    "export": lambda call, x: torch.export.export(Called(call), (x,)),
}


class Called(torch.nn.Module):
    def __init__(self, call: Callable[..., Any]):
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recorder", RECORDERS)
def test_what_is_recorded(ranks: Ranks, recorder: str) -> None:
    """Nothing of an operation would be in the recorded program, which would go on with numbers of now."""
    group, odd = ranks.world, ranks.size - 1
    rows = torch.ones(group.size, 2)

    def barrier(x: torch.Tensor) -> torch.Tensor:
        commlab.barrier(group)
        return x * 2

    calls: list[Callable[[torch.Tensor], Any]] = [
        lambda x: commlab.allreduce(x * 2, group=group) + 1,
        lambda x: commlab.allreduce(x.sum(), group=group) + 1,
        lambda x: commlab.allreduce_async(x * 2, group=group).wait() + 1,
        lambda x: commlab.broadcast(x * 2, group=group) + 1,
        lambda x: commlab.grouped_allreduce([x * 2], group=group)[0] + 1,
        lambda x: commlab.allgather_parts(x * 2, group=group)[0] + 1,
        lambda x: commlab.alltoall(torch.empty(group.size, 2), rows * x[0], group=group) + 1,
        lambda x: x * commlab.allgather_object(1, group=group)[0],
        barrier,
    ]
    for call in calls:
        x = torch.ones(6)
        words = f"inside .*{recorder}|stands for other tensors"
        all_are_told(
            group,
            odd,
            lambda call=call, x=x: RECORDERS[recorder](call, x) if group.rank == odd else call(x),  # type: ignore[misc]
            words,
        )
    to, frm = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    if group.rank == odd:
        with pytest.raises(commlab.UsageError, match=f"send inside .*{recorder}"):
            RECORDERS[recorder](lambda x: commlab.send(x, to, group=group), torch.ones(6))
    if frm == odd:
        with pytest.raises(RefusedError, match=f"could not send .*inside .*{recorder}"):
            commlab.recv(torch.zeros(6), frm, group=group)
    counted = torch.ones(6)
    with FlopCounterMode(display=False):
        commlab.allreduce(counted, "sum", group=group)
    assert torch.equal(counted, torch.full((6,), float(group.size))), "a counter records nothing"


def refused_arguments(group: Group, odd: int) -> None:
    """Every argument but the tensor, wrong on rank ``odd``."""
    x = torch.ones(6)
    part = torch.ones(6 // group.size + (group.rank < 6 % group.size))
    options: list[tuple[dict[str, Any], str]] = [
        ({"op": "avg"}, "unknown op 'avg'"),
        ({"op": ["sum"]}, "must be text"),
        ({"algorithm": "rnig"}, "unknown algorithm 'rnig'"),
        ({"algorithm": 3}, "must be text|unknown algorithm 3"),
        ({"wire": "fp8"}, "unknown wire 'fp8'"),
        ({"name": 5}, "must be text"),
    ]
    for wrong, words in options:
        right: dict[str, Any] = {}
        given = wrong if group.rank == odd else right
        all_are_told(group, odd, partial(commlab.allreduce, x.clone(), group=group, **given), words)
    is_odd = group.rank == odd
    rows = torch.ones(group.size, 2)
    nine: Any = torch.ones(9) if is_odd else part
    wrong_root: Any = 99 if is_odd else 0
    text_root: Any = "0" if is_odd else 0
    no_list: Any = None if is_odd else [0, 1]
    for call, words in (
        (lambda: commlab.broadcast(x, wrong_root, group=group), "root 99; the group has"),
        (lambda: commlab.broadcast(x, text_root, group=group), "root '0', which is no rank"),
        (lambda: commlab.reduce(x, -1 if is_odd else 0, group=group), "root -1"),
        (lambda: commlab.allgather(x, nine, group=group), "part has 9"),
        (lambda: commlab.reduce_scatter(nine, x, group=group), "part has 9 numbers"),
        (lambda: commlab.gather([x] * group.size, x, wrong_root, group=group), "root 99|share memory"),
        (lambda: commlab.scatter(x.clone(), [x] * group.size, text_root, group=group), "root '0', which is no rank"),
        (lambda: commlab.gather([x.clone() for _ in range(group.size - is_odd)], x, odd, group=group), "one for each"),
        (lambda: commlab.gather([x] * group.size, x, odd, group=group), "share memory"),
        (lambda: commlab.scatter(x.clone(), no_list, odd, group=group), "one for each rank"),
        (
            lambda: commlab.alltoall(rows.clone(), rows, None, [1.5] * group.size if is_odd else None, group=group),
            "1.5",
        ),
        (lambda: commlab.alltoall(rows.clone(), rows[is_odd:], group=group), "rows of the first dimension"),
        (lambda: commlab.alltoall(rows.double() if is_odd else rows.clone(), rows, group=group), "of one dtype"),
        (lambda: commlab.allgather_parts(x, 5 if is_odd else None, group=group), "must be text"),
        (lambda: commlab.grouped_allreduce([x.clone(), x.double()], "avg" if is_odd else "sum", group=group), "'avg'"),
        (lambda: commlab.grouped_allreduce([] if is_odd else [x.clone(), x.long()], "sum", group=group), "no tensor"),
        (lambda: commlab.broadcast_object(1, wrong_root, group=group), "root 99; the group has"),
        (lambda: group.subgroup([0, 0] if is_odd else [0, 1]), "not a set of ranks"),
        (lambda: group.subgroup(no_list), "TypeError"),
    ):
        all_are_told(group, odd, call, words)


def test_arguments_of_one_rank(ranks: Ranks) -> None:
    """B18: op, algorithm, wire, name, root, sizes of parts and ranks of a subgroup."""
    for group in groups_of(ranks):
        for odd in {0, group.size - 1}:
            refused_arguments(group, odd)


def test_what_all_ranks_refuse_has_one_reason(ranks: Ranks) -> None:
    """B18: a mistake in the program is the same on all ranks, and is said once."""
    for group in groups_of(ranks):
        for _ in range(2):
            with pytest.raises(commlab.UsageError, match=rf"^rank {group.rank}: allreduce of float32\[3\]: unknown op"):
                commlab.allreduce(torch.ones(3), "average", group=group)
        group.barrier()


def test_later_operations_keep_their_order(ranks: Ranks) -> None:
    """B18: a refusal in the middle of operations under way concerns itself alone."""
    for group in groups_of(ranks):
        data = [numbers(group.rank, numel, torch.float32) for numel in (5, 20_000, 7)]
        first = commlab.allreduce_async(data[0], "sum", group=group)
        refused = commlab.allreduce_async(data[1], "avg" if group.rank == 1 else "sum", group=group)
        last = commlab.allreduce_async(data[2], "sum", group=group)
        assert torch.equal(last.wait(), expected("sum", group.size, 7, torch.float32))
        with pytest.raises(RefusedError, match=r"rank 1: .*unknown op 'avg'"):
            refused.wait()
        assert torch.equal(data[1], numbers(group.rank, 20_000, torch.float32))
        assert torch.equal(first.wait(), expected("sum", group.size, 5, torch.float32))


def test_memory_that_runs_out_on_one_rank(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """B18: a copy that one rank can't make, once the operation was started, is told before anything is sent."""
    from commlab.collectives import plan

    def no_memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("not enough memory")

    for group in groups_of(ranks):
        mine = torch.ones(40_000).view(200, 200).t()
        with monkeypatch.context() as patch:
            if group.rank == 1:
                patch.setattr(plan, "as_flat", no_memory)
            # Only ways that copy when the operation begins: without a copy there is nothing to fail.
            with pytest.raises(RefusedError, match=r"rank 1: .*RuntimeError: not enough memory"):
                commlab.allreduce(mine, "sum", algorithm="auto" if group.window else "direct", group=group)
        group.barrier()
