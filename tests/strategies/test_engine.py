"""The engine's contract: what must be called when, what is refused, and what happens then.

One rank is enough: all of it is found before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training import alone

import commlab
from commlab.errors import UsageError
from commlab.job.topology import Topology
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine
from commlab.transport.sim import SimNetwork

CONTRACT = ("single", "allreduce", "ps", "dps")


def small(strategy: str, **options: Any) -> tuple[Engine, torch.nn.Linear]:
    model = torch.nn.Linear(3, 2)
    return commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), alone(), **options), model


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(torch.ones(4, 3)).square().sum()
    return result


@pytest.mark.parametrize("strategy", CONTRACT)
def test_second_backward_of_a_step_is_refused_and_the_step_survives(strategy: str) -> None:
    engine, model = small(strategy)
    engine.backward(loss_of(model))
    with pytest.raises(UsageError, match=r"second backward\(\) in one step.*no_sync"):
        engine.backward(loss_of(model))
    engine.step()
    assert engine.steps == 1


@pytest.mark.parametrize("strategy", CONTRACT)
def test_step_needs_a_backward_that_syncs(strategy: str) -> None:
    engine, model = small(strategy)
    with pytest.raises(UsageError, match=r"step\(\) without a backward\(\) outside no_sync"):
        engine.step()
    with engine.no_sync():
        engine.backward(loss_of(model))
    with pytest.raises(UsageError, match=r"step\(\) without a backward\(\) outside no_sync"):
        engine.step()
    engine.backward(loss_of(model))
    engine.step()
    with pytest.raises(UsageError, match="without a backward"):
        engine.step()


@pytest.mark.parametrize("strategy", ["single", "allreduce"])
def test_missing_zero_grad_is_noticed(strategy: str) -> None:
    engine, model = small(strategy)
    engine.backward(loss_of(model))
    engine.step()
    with pytest.raises(UsageError, match=r"engine\.zero_grad\(\) after engine\.step\(\)"):
        engine.backward(loss_of(model))
    engine.zero_grad()
    engine.backward(loss_of(model))


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_servers_need_no_zero_grad(strategy: str) -> None:
    engine, model = small(strategy)
    twin_engine, twin = small("single")
    twin.load_state_dict(model.state_dict())
    for _ in range(3):
        engine.backward(loss_of(model))
        engine.step()
        twin_engine.backward(loss_of(twin))
        twin_engine.step()
        twin_engine.zero_grad()
    assert torch.allclose(model.weight, twin.weight, rtol=1e-6)


@pytest.mark.parametrize("strategy", CONTRACT)
def test_zero_grad_drops_what_was_accumulated_and_is_refused_in_between(strategy: str) -> None:
    engine, model = small(strategy)
    twin_engine, twin = small(strategy)
    twin.load_state_dict(model.state_dict())
    with engine.no_sync():
        engine.backward(loss_of(model), 1000)
    engine.zero_grad()
    for each, net in ((engine, model), (twin_engine, twin)):
        each.backward(loss_of(net), 4)
    with pytest.raises(UsageError, match=r"zero_grad\(\) between backward\(\) and step\(\)"):
        engine.zero_grad()
    for each in (engine, twin_engine):
        each.step()
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("strategy", CONTRACT)
@pytest.mark.parametrize("first, second", [(4, None), (None, 4)])
def test_counts_are_given_always_or_never(strategy: str, first: int | None, second: int | None) -> None:
    engine, model = small(strategy)
    with engine.no_sync():
        engine.backward(loss_of(model), first)
    with pytest.raises(UsageError, match=r"either every backward\(\) call is given a count, or none"):
        engine.backward(loss_of(model), second)


@pytest.mark.parametrize("strategy", CONTRACT)
@pytest.mark.parametrize("count", [None, 3])
def test_no_loss_needs_a_count_of_zero(strategy: str, count: int | None) -> None:
    engine, _ = small(strategy)
    with pytest.raises(UsageError, match="count=0"):
        engine.backward(None, count)


@pytest.mark.parametrize("strategy", CONTRACT)
def test_a_step_without_any_sample_changes_nothing(strategy: str) -> None:
    model = torch.nn.Linear(3, 2)
    engine = commlab.strategy(
        strategy,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5),
        alone(),
        max_grad_norm=1.0,
    )
    engine.backward(loss_of(model), 4)
    engine.step()
    engine.zero_grad()
    before = model.weight.detach().clone()
    engine.backward(None, 0)
    engine.step()
    assert torch.equal(model.weight, before) and engine.grad_norm == 0


@pytest.mark.parametrize("strategy", CONTRACT)
def test_an_exception_inside_no_sync_does_not_leave_it_on(strategy: str) -> None:
    engine, model = small(strategy)
    with pytest.raises(KeyError), engine.no_sync():
        raise KeyError
    engine.backward(loss_of(model))
    engine.step()


class Fails(torch.autograd.Function):
    """Backward ends in an exception, as one out of memory does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise MemoryError("as if")


@pytest.mark.parametrize("strategy", CONTRACT)
def test_a_backward_that_failed_can_be_dropped(strategy: str) -> None:
    def build() -> tuple[Engine, torch.nn.Sequential]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.arange(parameter.numel()).sin().view(parameter.shape))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return commlab.strategy(strategy, model, optimizer, alone(), bucket_bytes=1), model

    engine, model = build()
    twin_engine, twin = build()
    with pytest.raises(MemoryError):
        # The last layer's gradients are on their way when the first layer's fail.
        engine.backward(model[1](Fails.apply(model[0](torch.ones(4, 3)))).square().sum(), 4)
    with pytest.raises(UsageError, match="without a backward"):
        engine.step()
    engine.zero_grad()
    for each, net in ((engine, model), (twin_engine, twin)):
        each.backward(loss_of(net), 4)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    "strategy, options, message",
    [
        ("zero", {}, "unknown strategy 'zero'; there are single, ps, dps, allreduce, horovod, ddp"),
        ("dps", {"wires": "fp16"}, "unknown option 'wires' for a strategy; there are algorithm, precision, .*wire,"),
        ("dps", {"wire": "fp8"}, "unknown wire 'fp8'; there are none, fp16, bf16"),
        ("dps", {"precision": "int4"}, "unknown precision 'int4'; there are fp32, bf16, fp16"),
        ("ps", {"algorithm": "star"}, "unknown algorithm 'star'; there are auto, ring, halving, tree, direct"),
        ("allreduce", {"max_grad_norm": -1.0}, "max_grad_norm must be positive, not -1.0"),
        ("allreduce", {"max_grad_norm": 0}, "max_grad_norm must be positive, not 0"),
        ("ddp", {"wire": "fp16"}, "strategy ddp sends gradients as they are"),
    ],
)
def test_what_does_not_exist_is_named_at_once(strategy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(strategy, **options)


def test_single_is_for_one_rank() -> None:
    group = Group(SimNetwork(3).transports()[1], Topology(((0, 1, 2),)))
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UsageError, match="strategy single trains on one rank, and this job has 3"):
        commlab.strategy("single", model, torch.optim.SGD(model.parameters(), lr=0.1), group)


@pytest.mark.parametrize("strategy", CONTRACT)
def test_the_optimizer_must_have_the_models_parameters(strategy: str) -> None:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(UsageError, match="'bias' is trainable, but the optimizer does not have it"):
        commlab.strategy(strategy, model, torch.optim.SGD([model.weight], lr=0.1), alone())


class Signed(torch.optim.Optimizer):
    """Element-wise, but of the user's own."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for entry in self.param_groups:
            for parameter in entry["params"]:
                if parameter.grad is not None:
                    parameter -= entry["lr"] * parameter.grad.sign()


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS, Signed])
@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_servers_refuse_optimizers_that_may_need_whole_tensors(
    strategy: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(
        UsageError, match=rf"optimizer {make.__name__} may need whole tensors.*elementwise=True.*allreduce"
    ):
        commlab.strategy(strategy, model, optimizer, alone())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True)), "left as it was"


@pytest.mark.parametrize(
    "strategy, options", [("ps", {"elementwise": True}), ("dps", {"elementwise": True}), ("allreduce", {})]
)
def test_an_optimizer_of_ones_own_runs_where_it_is_declared_elementwise(strategy: str, options: dict[str, Any]) -> None:
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    engine = commlab.strategy(strategy, model, Signed(model.parameters()), alone(), **options)
    engine.backward(model(torch.ones(1, 3)).sum() * 7)
    engine.step()
    assert torch.allclose(model.weight, before - 0.1)


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_a_parameter_that_was_moved_is_named(strategy: str) -> None:
    engine, model = small(strategy)
    model.bias.data = model.bias.data.clone()
    engine.backward(loss_of(model))
    with pytest.raises(UsageError, match="parameter 'bias' was given other memory after"):
        engine.step()


def test_overlap_cannot_be_turned_off_where_no_bucket_travels() -> None:
    with pytest.raises(UsageError, match=r"strategy single sends no buckets.*overlap.*ps, dps, allreduce"):
        small("single", overlap=False)
