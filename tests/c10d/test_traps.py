"""What breaks a process group that is written in Python: each trap that was found is a test here."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from torch import nn

from commlab.c10d.membership import Membership
from commlab.c10d.process_group import CommlabProcessGroup
from commlab.errors import DisagreementError


def trampolined() -> set[str]:
    """What C++ calls of a process group that is written in Python, by the names of 2.13 and of those before."""
    return {
        *("allgather", "all_gather_single_coalesced", "allgather_into_tensor_coalesced", "allreduce"),
        *("allreduce_coalesced", "all_to_all_single", "alltoall_base", "barrier", "broadcast", "reduce_scatter"),
        *("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced", "send", "recv", "getBackendName"),
        *("abort", "getGroupName", "setGroupName", "getGroupDesc", "setGroupDesc"),
    }


def test_every_method_is_overridden() -> None:
    """Trap 1: what is not overridden runs in C++ with the GIL held, while gloo's thread wants it. Trap 5: names changed
    in 2.13; the old and the new are the same method."""
    own = {**vars(Membership), **vars(CommlabProcessGroup)}
    by_python = {"reduce", "gather", "scatter", "alltoall", "all_gather_single", "_allgather_base", "recv_anysource"}
    by_python |= {"reduce_scatter_single", "_reduce_scatter_base", "allgather_coalesced", "monitored_barrier"}
    assert sorted((trampolined() | by_python) - set(own)) == []
    for old, new in (
        ("_allgather_base", "all_gather_single"),
        ("_reduce_scatter_base", "reduce_scatter_single"),
        ("alltoall_base", "all_to_all_single"),
        ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
        ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    ):
        assert own[old] is own[new]


def test_the_header_has_no_other_method() -> None:
    """Trap 1: this torch's C++ calls nothing that the list above does not name."""
    header = os.path.join(os.path.dirname(torch.__file__), "include/torch/csrc/distributed/c10d/PyProcessGroup.hpp")
    if not os.path.exists(header):
        pytest.skip("this torch has no headers")
    text = Path(header).read_text()
    named = set(re.findall(r"(?:ProcessGroup|cname), /\* Parent class \*/\s*(\w+)", text)) | set(
        re.findall(r'get_override\(\s*static_cast<const ProcessGroup\*>\(this\),\s*"(\w+)"', text)
    )
    assert named and named - trampolined() - {"getRank", "getSize", "splitGroup", "mergeRemoteGroup"} == set()


def fallbacks_beside_python(rank: int, size: int) -> None:
    """Operations of gloo and of commlab, while another thread keeps the GIL busy."""
    sys.setswitchinterval(5e-4)  # each operation asks for the GIL several times; 5 ms are Python's own
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for count in range(60):
            bits = torch.tensor([1 << rank])
            dist.all_reduce(bits, dist.ReduceOp.BXOR)
            assert bits.item() == 2**size - 1
            dist.all_reduce_coalesced(tensors := [torch.ones(3), torch.ones(2)])
            assert tensors[1].tolist() == [size, size]
            outs = [torch.empty(size, 1)]
            dist.all_gather_into_tensor(outs[0], torch.full((1, 1), float(rank + count)))
            assert outs[0][-1] == size - 1 + count
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def two_threads(rank: int, size: int) -> None:
    """Two groups, each with a thread, opened in another order on each rank."""
    groups = [dist.new_group() for _ in range(2)]
    wrong: list[BaseException] = []

    def work(group: Any, count: int) -> None:
        try:
            for _ in range(count):
                dist.all_reduce(ones := torch.ones(1000), group=group)
                assert ones[0] == size
        except BaseException as error:
            wrong.append(error)

    order = groups if rank % 2 else groups[::-1]
    threads = [threading.Thread(target=work, args=(group, 100)) for group in order]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def futures(rank: int, size: int) -> None:
    """Traps 2 and 3: what a work answers, and a future whose error C++ learns of."""
    for threaded in (False, True):
        group: Any = dist.group.WORLD
        assert group.group.size == size
        group._futures.threaded = threaded
        work = dist.all_reduce(ones := torch.ones(70_000), async_op=True)
        assert work.wait(timedelta(seconds=20)) and work.is_completed() and work.is_success()
        assert work.exception() is None and work.result()[0] is ones and ones[-1] == size
        future = dist.all_reduce(ones, async_op=True).get_future().then(lambda found: found.value()[0] / size)
        assert future.wait()[0] == size
        work = dist.all_reduce(torch.ones(3 + rank), async_op=True)
        with pytest.raises(RuntimeError, match=r"float32\[3\].*float32\[4\]"):
            work.get_future().wait()
        with pytest.raises(DisagreementError):
            work.wait()
        assert work.is_completed() and not work.is_success() and work.exception() is not None
    group._futures.threaded = False


def ddp_fails_by_name(rank: int, size: int, threaded: bool) -> str:
    """Trap 2: a bucket that fails is an error of backward(), not a crash, and not a wrong gradient."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
    group: Any = dist.group.WORLD
    group._futures.threaded = threaded
    loss = model(torch.ones(2, 4)).sum()
    try:
        if rank == 1:
            dist.all_reduce(torch.ones(5))  # one operation too many
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("threaded", [False, True])
def test_ddp_raises_out_of_backward(forked: Forked, threaded: bool) -> None:
    for text in forked(ddp_fails_by_name, 2, arguments=(threaded,)):
        assert "rank 0: allreduce" in text and "float32[15]" in text and "float32[5]" in text, text


def builtin_hooks(rank: int, size: int) -> None:
    """Trap 8: DDP's hooks that are written in C++ want a future that knows its type."""
    for threaded in (False, True):
        for hook in (dist.BuiltinCommHookType.ALLREDUCE, dist.BuiltinCommHookType.FP16_COMPRESS):
            torch.manual_seed(0)
            model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
            group: Any = dist.group.WORLD
            group._futures.threaded = threaded
            model._register_builtin_comm_hook(hook)
            model(torch.full((2, 4), rank + 1.0)).sum().backward()
            assert torch.equal(model.module.weight.grad, torch.full((3, 4), size + 1.0)), hook
    group._futures.threaded = False


def integers_have_means(rank: int, size: int) -> None:
    """Trap 6: AVG of integers is cut, as NCCL does; and FSDP asks for AVG in 16 bits."""
    for dtype in (torch.int64, torch.int32, torch.uint8):
        dist.all_reduce(mean := torch.tensor([3 * rank, 7, 1 + rank], dtype=dtype), dist.ReduceOp.AVG)
        total = size * (size - 1) // 2
        assert mean.tolist() == [3 * total // size, 7, (total + size) // size]
    dist.all_reduce(mean16 := torch.full((5,), rank + 0.5, dtype=torch.bfloat16), dist.ReduceOp.AVG)
    assert (mean16 == size / 2).all()


def inference_tensors(rank: int, size: int) -> None:
    with torch.inference_mode():
        dist.all_reduce(strided := torch.ones(3, 4).t())
        works = [dist.all_reduce(torch.ones(4, 3).t(), async_op=True) for _ in range(2)]
        dist.broadcast(strided, 0)
        dist.all_gather(outs := [torch.empty_like(strided) for _ in range(size)], strided)
    works[0].wait()
    works[1].get_future().wait()
    assert works[1].result()[0][0, 0] == size and outs[-1][0, 0] == size


def autograd_leaves(rank: int, size: int) -> None:
    leaf = nn.Parameter(torch.full((3,), float(rank)))
    dist.broadcast(leaf, 0)
    assert leaf.tolist() == [0, 0, 0] and leaf.requires_grad
    with torch.no_grad():
        dist.all_reduce(leaf.add_(1))
    assert leaf.tolist() == [size] * 3


def works_outlive_groups(rank: int, size: int) -> None:
    """Trap 9: groups are made and destroyed many times, and a work is asked when its group is gone."""
    for _ in range(12):
        group = dist.new_group()
        work = dist.all_reduce(ones := torch.ones(20_000), group=group, async_op=True)
        work.wait()
        dist.destroy_process_group(group)
        assert work.wait() and work.is_completed() and ones[0] == size
    assert len(os.listdir("/proc/self/fd")) < 200


def members_only(rank: int, size: int) -> None:
    """Trap 11: a sub-group is made by its members, while others are elsewhere."""
    pairs = [dist.new_group([0, size - 1]), dist.new_group([size - 1])]
    if rank in (0, size - 1):
        dist.all_reduce(ones := torch.ones(3), group=pairs[0])
        assert ones[0] == 2
    if rank == size - 1:
        dist.all_reduce(ones, group=pairs[1])
        assert ones[0] == 2
    dist.barrier()
    halves, _ = dist.new_subgroups(1)
    dist.all_reduce(ones := torch.ones(1), group=halves)
    assert ones == 1
    dist.barrier()  # rank 0 holds the store that groups are made through


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "body",
    [
        fallbacks_beside_python,
        two_threads,
        integers_have_means,
        inference_tensors,
        autograd_leaves,
        works_outlive_groups,
        members_only,
    ],
)
def test_trap(forked: Forked, body: Any, size: int) -> None:
    forked(body, size)


@pytest.mark.parametrize("body", [futures, builtin_hooks])
def test_trap_of_two(forked: Forked, body: Any) -> None:
    forked(body, 2)


def test_works_answer_as_torchs() -> None:
    """Trap 3: a work written in Python has every method that programs call."""
    from commlab.c10d.work import CommlabWork, Futures

    work = CommlabWork(Futures(False), (), ["value"])
    assert work.wait() and work.is_completed() and work.is_success() and work.result() == ["value"]
    assert work.exception() is None and work.source_rank() == -1 and work._source_rank() == -1
    work.synchronize()
    assert work.get_future().value() == ["value"]


def as_its_own_backend(rank: int, size: int) -> None:
    """Trap 4: who looks for a backend's abilities gets an answer, and no recursion."""
    group: Any = dist.group.WORLD
    backend = group._get_backend(torch.device("cpu"))
    assert (backend.supports_coalescing, backend.supports_splitting, backend.supports_time_estimate) == (False,) * 3
    operations = [dist.P2POp(dist.irecv, torch.empty(2), 1 - rank), dist.P2POp(dist.isend, torch.ones(2), 1 - rank)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def test_abilities(forked: Forked) -> None:
    forked(as_its_own_backend, 2)


def mixed_devices(rank: int, size: int) -> str:
    """A group written in Python is the whole group: another backend in it would be lost without a word."""
    try:
        dist.init_process_group("cpu:commlab,cuda:gloo", rank=rank, world_size=size, store=dist.HashStore())
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_mixed_devices_are_refused(forked: Forked) -> None:
    assert "can't share a group with gloo" in forked(mixed_devices, 1, backend=None)[0]


def fallback_agrees(rank: int, size: int) -> None:
    """Trap 10: ranks whose tensors lie differently in memory choose the same way."""
    for numel in (1, 7, 9001):
        own = torch.ones(2 * numel, dtype=torch.uint8)[::2] if rank else torch.ones(numel, dtype=torch.uint8)
        dist.all_reduce(own)
        dist.broadcast(own, 0)
        shifted = torch.ones(40_003, dtype=torch.uint8)[rank:][:40_000]
        dist.broadcast(shifted, 0)
        assert (own == size).all()


def test_layouts_do_not_matter(forked: Forked) -> None:
    forked(fallback_agrees, 3)
