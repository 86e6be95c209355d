"""Programs of torch on commlab's backend give the numbers that they give on gloo: at two ranks, where no order of
addition is left to choose, bit for bit."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from torch import nn

from commlab.c10d import DDPHook


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))


def train(model: nn.Module, optimizer: Any, rank: int, steps: int = 3) -> None:
    for step in range(steps):
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(parameters: Any) -> list[str]:
    """The numbers, exactly."""
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return [value.hex() for p in full for value in p.detach().reshape(-1).tolist()]


def ddp(rank: int, size: int) -> list[str]:
    found: list[str] = []
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"bucket_cap_mb": 0.001},
    )
    for options in kinds:
        model = nn.parallel.DistributedDataParallel(net(), **options)
        train(model, torch.optim.SGD(model.parameters(), 0.1), rank)
        found += bits(model.parameters())
    with model.no_sync():
        model(batch(rank, 9)).sum().backward()
    model(batch(rank, 10)).sum().backward()
    return found + bits(p.grad for p in model.parameters())


def ddp_hooks(rank: int, size: int) -> list[str]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power

    found: list[str] = []
    hooks: tuple[tuple[Any, Any], ...] = (
        (default_hooks.allreduce_hook, None),
        (default_hooks.fp16_compress_hook, None),
        (power.powerSGD_hook, power.PowerSGDState(None, start_powerSGD_iter=2)),
    )
    for hook, state in hooks:
        model = nn.parallel.DistributedDataParallel(net())
        model.register_comm_hook(state, hook)
        train(model, torch.optim.SGD(model.parameters(), 0.1), rank)
        found += bits(model.parameters())
    return found


def fsdp2(rank: int, size: int) -> list[str]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    found: list[str] = []
    for policy in (
        MixedPrecisionPolicy(),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    ):
        model: Any = net()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mp_policy=policy)
        train(model, torch.optim.SGD(model.parameters(), 0.1), rank)
        found += bits(model.parameters())
    return found


def fsdp1(rank: int, size: int) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    train(model, torch.optim.SGD(model.parameters(), 0.1), rank)
    with FullyShardedDataParallel.summon_full_params(model):
        return bits(model.parameters())


def zero(rank: int, size: int) -> list[str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    train(model, optimizer, rank)
    optimizer.consolidate_state_dict(0)
    return bits(model.parameters())


def join(rank: int, size: int) -> list[str]:
    from torch.distributed.algorithms.join import Join

    model = nn.parallel.DistributedDataParallel(net())
    with Join([model]):
        train(model, torch.optim.SGD(model.parameters(), 0.1), rank, 2 + rank)
    return bits(model.parameters())


def tensor_parallel(rank: int, size: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = parallelize_module(
        net(), init_device_mesh("cpu", (size,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    model(batch(0, 0)).square().mean().backward()
    return bits(p.grad for p in model.parameters())


def checkpoint(rank: int, size: int) -> list[str]:
    import torch.distributed.checkpoint as dcp

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    model = nn.parallel.DistributedDataParallel(net())
    train(model, torch.optim.SGD(model.parameters(), 0.1), rank)
    dcp.save({"model": model.module.state_dict()}, checkpoint_id=folder[0])
    fresh = net()
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=folder[0])
    return bits(state["model"].values())


def functional(rank: int, size: int) -> list[str]:
    import torch.distributed._functional_collectives as functional_collectives

    group, x = dist.group.WORLD, torch.full((4, 2), rank + 0.5)
    f: Any = functional_collectives
    found = [
        f.all_reduce(x, "sum", group),
        f.all_gather_tensor(x, 0, group),
        f.reduce_scatter_tensor(x.repeat(size, 1), "avg", 0, group),
        f.all_to_all_single(torch.arange(2.0 * size) + rank, [2] * size, [2] * size, group),
        f.broadcast(x, 0, group),
        *f.all_reduce_coalesced([x, 2 * x], "sum", group),
        *f.all_gather_into_tensor_coalesced([x, 2 * x], group),
    ]
    waited = [f.wait_tensor(each) for each in found]
    leaf = torch.full((2,), rank + 1.0, requires_grad=True)
    torch.distributed.nn.functional.all_reduce(leaf * 3).sum().backward()
    return bits([*waited, leaf.grad])


PRELOAD = (
    "torch._dynamo",  # an optimizer's first step would load it, in every rank
    "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
)


def on(forked: Forked, body: Any, backend: str, size: int) -> list[Any]:
    return forked(body, size, backend=backend, limit_s=100, preload=PRELOAD)


PROGRAMS = (ddp, ddp_hooks, fsdp2, fsdp1, zero, join, tensor_parallel, checkpoint, functional)


@pytest.mark.parametrize("body", PROGRAMS, ids=lambda body: body.__name__)
def test_as_gloo(forked: Forked, body: Any) -> None:
    assert on(forked, body, "commlab", 2) == on(forked, body, "gloo", 2)


@pytest.mark.parametrize("body", [ddp, fsdp2, zero, join, checkpoint], ids=lambda body: body.__name__)
def test_three_ranks_agree(forked: Forked, body: Any) -> None:
    """Sums of three may be rounded otherwise than gloo's; all ranks have the same bits."""
    found, reference = on(forked, body, "commlab", 3), on(forked, body, "gloo", 3)
    assert found[0] == found[1] == found[2]
    ours, theirs = ([float.fromhex(value) for value in each[0]] for each in (found, reference))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def hooked(rank: int, size: int, wire: str | None) -> list[list[str]]:
    """The same three steps, through commlab's hook and by hand: the mean of all ranks' gradients, rounded once."""
    found: list[list[str]] = []
    for options in ({"bucket_cap_mb": 0.001}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        model = nn.parallel.DistributedDataParallel(net(), **options)  # type: ignore[arg-type]
        DDPHook(wire=wire).attach(model)
        for step in range(2):
            model.zero_grad()
            model(batch(rank, step)).square().mean().backward()
        found.append(bits(p.grad for p in model.parameters()))
    every: list[Any] = []
    for peer in range(size):
        model_alone = net()
        model_alone(batch(peer, 1)).square().mean().backward()
        every.append([p.grad for p in model_alone.parameters()])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[wire]
    sums = [sum(each.to(dtype).float() for each in grads) / size for grads in zip(*every, strict=True)]
    return [*found, bits(each.to(dtype).float() for each in sums)]  # type: ignore[union-attr]


@pytest.mark.parametrize("wire", [None, "bf16", "fp16"])
def test_hook(forked: Forked, wire: str | None) -> None:
    """A 16-bit wire: each contribution is rounded to it, their fp32 mean once."""
    for found in forked(hooked, 2, arguments=(wire,)):
        assert found[0] == found[1] == found[2] == found[3]


def hook_that_fails(rank: int, size: int) -> str:
    model = nn.parallel.DistributedDataParallel(net(), bucket_cap_mb=0.001)
    DDPHook().attach(model)
    loss = model(batch(rank, 0)).sum()
    try:
        if rank == 1:
            dist.all_reduce(torch.ones(5))
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_hook_raises_out_of_backward(forked: Forked) -> None:
    for text in forked(hook_that_fails, 2):
        assert "rank 0: allreduce" in text and "float32[5]" in text, text


def allocated(rank: int, size: int) -> list[str]:
    """FSDP2 asks the group for the memory of its collectives: they get it in the window."""
    from torch.distributed.fsdp import fully_shard

    model: Any = net()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
        layer.set_allocate_memory_from_process_group_for_comm(True)
    train(model, torch.optim.SGD(model.parameters(), 0.1), rank)
    group: Any = dist.group.WORLD
    memory = group.allocate_tensor(1000, dtype=torch.float32, device=torch.device("cpu"))
    assert group.group.window.locate(memory) is not None
    address = memory.data_ptr()
    del memory
    again = group.allocate_tensor(1000, dtype=torch.float32, device=torch.device("cpu"))
    assert again.data_ptr() == address
    return bits(model.parameters())


def without_allocation(rank: int, size: int) -> list[str]:
    return fsdp2(rank, size)[: 16 * 32 + 32 + 32 * 4 + 4]


def test_memory_of_the_window(forked: Forked) -> None:
    assert on(forked, allocated, "commlab", 2) == on(forked, without_allocation, "gloo", 2)
