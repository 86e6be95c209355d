"""DDP's buckets are waited for when backward ends, and whoever must have them sooner has them sooner."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from torch import nn
from torch.utils.checkpoint import checkpoint

from commlab.c10d.backward import AtEnd

SMALL: dict[str, Any] = {"bucket_cap_mb": 0.001}
"""Several buckets, also of the small models here."""


class Net(nn.Module):
    """``within``: so many of the first layers are computed anew in backward, each in a backward of its own."""

    def __init__(self, within: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.within = within

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, layer in enumerate(self.layers):
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=True) if at < self.within else layer(x)
            x = x.tanh()
        return x


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))


def bits(parameters: Any) -> list[str]:
    return [value.hex() for p in parameters for value in p.detach().reshape(-1).tolist()]


def gradients(model: nn.Module) -> list[str]:
    return bits(p.grad for p in model.parameters() if p.grad is not None)


class Counted:
    """What is put off in the default group, and how many were waited for together."""

    def __init__(self) -> None:
        self.together: list[int] = []
        group: Any = dist.group.WORLD
        if not hasattr(group, "_futures"):
            return
        assert group.group.size == group.size()  # opened: only then the group knows whether a core is free
        group._futures.threaded = False
        at_end, complete = group._futures.at_end, group._futures.at_end.complete_all

        def complete_all() -> None:
            if at_end._put_off:
                self.together.append(len(at_end._put_off))
            complete()

        at_end.complete_all = complete_all

    def left(self) -> int:
        group: Any = dist.group.WORLD
        return len(group._futures.at_end._put_off)


def waits_at_the_end(rank: int, size: int) -> list[int]:
    counted, model = Counted(), nn.parallel.DistributedDataParallel(Net(), **SMALL)
    for step in range(3):
        model(batch(rank, step)).sum().backward()
    assert counted.left() == 0
    return counted.together


def test_buckets_are_waited_for_together(forked: Forked) -> None:
    for together in forked(waits_at_the_end, 2):
        assert together and min(together[1:]) > 1, together


def test_nothing_is_put_off_outside_of_a_backward() -> None:
    """A frame that is not the engine's, or none: whoever asks has to wait."""
    import sys

    called: list[int] = []
    at_end = AtEnd()
    assert not at_end.put_off(lambda: called.append(1), sys._getframe())
    assert not at_end.put_off(lambda: called.append(1), None)
    at_end.complete_all()
    assert not called


def reentrant(rank: int, size: int) -> list[str]:
    """Backwards within a backward: the last bucket may be launched in one that ends before the outer one."""
    Counted()
    found: list[str] = []
    for options, within in ((SMALL, 4), (SMALL, 2), ({}, 2), ({**SMALL, "static_graph": True}, 2)):
        model = nn.parallel.DistributedDataParallel(Net(within), **options)
        for step in range(3):
            model(batch(rank, step)).square().mean().backward()
        found += gradients(model)
    return found


class Inner(torch.autograd.Function):
    """A whole backward of a model within the backward of another."""

    model: Any

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        with torch.enable_grad():
            Inner.model(ctx.saved_tensors[0].detach()).square().mean().backward()
        return 2 * gradient


def nested(rank: int, size: int) -> list[str]:
    Counted()
    found: list[str] = []
    for static in (False, True):
        Inner.model = nn.parallel.DistributedDataParallel(Net(), static_graph=static, **SMALL)
        outer = nn.parallel.DistributedDataParallel(Net(), **SMALL)
        for step in range(3):
            Inner.apply(outer(batch(rank, step))).sum().backward()
        found += gradients(Inner.model) + gradients(outer)
    return found


def nested_in_a_hook(rank: int, size: int) -> list[str]:
    """The whole backward of another model in the hook of a gradient that has been accumulated."""
    Counted()
    found: list[str] = []
    for static in (False, True):
        inner = nn.parallel.DistributedDataParallel(Net(), static_graph=static, **SMALL)
        outer = nn.parallel.DistributedDataParallel(Net(), **SMALL)

        def train_inner(_: torch.Tensor, inner: nn.Module = inner) -> None:
            with torch.enable_grad():
                inner(batch(rank, 7)).square().mean().backward()

        outer.module.layers[2].weight.register_post_accumulate_grad_hook(train_inner)
        for step in range(3):
            outer(batch(rank, step)).square().mean().backward()
        found += gradients(inner) + gradients(outer)
    return found


def two_modules(rank: int, size: int) -> list[str]:
    """One backward through two models, of which one has been changed between the steps."""
    Counted()
    first = nn.parallel.DistributedDataParallel(Net(), **SMALL)
    second = nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True, **SMALL)
    for step in range(4):
        if step == 2:
            second.module.layers[0].requires_grad_(False)
            second = nn.parallel.DistributedDataParallel(second.module, find_unused_parameters=True, **SMALL)
        second(first(batch(rank, step))).square().mean().backward()
    return gradients(first) + gradients(second)


def accumulates(rank: int, size: int) -> list[str]:
    Counted()
    model = nn.parallel.DistributedDataParallel(Net(), gradient_as_bucket_view=True, **SMALL)
    for step in range(3):
        with model.no_sync():
            model(batch(rank, 2 * step)).square().mean().backward()
        model(batch(rank, 2 * step + 1)).square().mean().backward()
    return gradients(model)


def hooks_that_wait(rank: int, size: int) -> list[str]:
    """A gradient's hook in Python that needs its own sum while buckets are put off."""
    Counted()
    found: list[str] = []
    model = nn.parallel.DistributedDataParallel(Net(), **SMALL)

    def summed(parameter: torch.Tensor) -> None:
        total = torch.ones(70_000)
        found.append(dist.all_reduce(total, async_op=True).get_future().wait()[0][-1].item().hex())

    model.module.layers[1].weight.register_post_accumulate_grad_hook(summed)
    for step in range(3):
        model(batch(rank, step)).square().mean().backward()
    return found + gradients(model)


@pytest.mark.parametrize(
    "body",
    [reentrant, nested, nested_in_a_hook, two_modules, accumulates, hooks_that_wait],
    ids=lambda body: body.__name__,
)
def test_as_gloo(forked: Forked, body: Any) -> None:
    assert forked(body, 2) == forked(body, 2, backend="gloo")


class Breaks(torch.autograd.Function):
    """Raises in backward, where it is told to."""

    wanted = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if Breaks.wanted:
            raise ValueError("in the middle of backward")
        return gradient


def interrupted(rank: int, size: int) -> list[str]:
    """What a backward that broke off has put off is over before the next one's buckets, and harms none of them."""
    counted, model = Counted(), Net()
    model.layers[0].register_forward_hook(lambda module, given, x: Breaks.apply(x))
    wrapped = nn.parallel.DistributedDataParallel(model, **SMALL)
    for Breaks.wanted in (False, True):
        loss = wrapped(batch(rank, 1)).sum()
        with pytest.raises(ValueError, match="in the middle") if Breaks.wanted else nullcontext():
            loss.backward()
    assert counted.left() > 0, "the first layer's bucket is missing, so nobody has waited"
    again = nn.parallel.DistributedDataParallel(Net(), **SMALL)
    again(batch(rank, 2)).sum().backward()
    assert counted.left() == 0
    return gradients(again)


def test_a_backward_that_breaks_off(forked: Forked) -> None:
    first, second = forked(interrupted, 2)
    assert first == second and first
