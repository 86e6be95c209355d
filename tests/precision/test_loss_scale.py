"""The loss scale, and what makes ranks skip a step: the same decision everywhere, and the right one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import training
from crew import SharedNetwork
from hypothesis import example, given, settings
from hypothesis import strategies as st

import commlab
from commlab.job.topology import Topology
from commlab.precision.loss_scale import LossScale
from commlab.runtime.group import Group

# The loss scale by itself.


def test_growth_and_backoff() -> None:
    scale = LossScale(value=1024.0, growth_interval=3)
    values = []
    for overflowed in (False, False, True, False, False, False, False, False, False, True, True):
        scale.update(overflowed)
        values.append(scale.value)
    # An overflow begins the count of good steps anew.
    assert values == [1024, 1024, 512, 512, 512, 1024, 1024, 1024, 2048, 1024, 512]


def test_it_never_falls_below_one() -> None:
    scale = LossScale(value=2.0)
    for _ in range(5):
        scale.update(True)
    assert scale.value == 1.0


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_it_is_a_power_of_two_and_is_saved_whole(overflows: list[bool], interval: int) -> None:
    scale, good = LossScale(growth_interval=interval), 0
    exponent = 16
    for at, overflowed in enumerate(overflows):
        scale.update(overflowed)
        good = 0 if overflowed else good + 1
        exponent = max(0, exponent - 1) if overflowed else exponent + (good == interval)
        good %= interval
        assert scale.value == 2.0**exponent
        if at == len(overflows) // 2:
            again = LossScale(growth_interval=interval)
            again.load_state_dict(scale.state_dict())
            scale = again


# Ranks as threads of this process.


def on_ranks(size: int, work: Callable[[Group], Any]) -> list[Any]:
    """``work(group)`` of every rank, each in a thread; results in rank order."""
    results: list[Any] = [None] * size
    failures: list[BaseException] = []
    transports = SharedNetwork(size).transports()

    def run(rank: int) -> None:
        group = Group(transports[rank], Topology((tuple(range(size)),)), timeout_s=20.0)
        try:
            results[rank] = work(group)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
    return results


NUMELS = (3, 1, 5)
GRADIENTS = st.one_of(
    st.floats(-1.0, 1.0, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
    st.sampled_from([0.0, -0.0, 65504.0, 65519.0, 65520.0, -65536.0, 1e-30, 3.0e38, -3.0e38, 1e20]),
)
BAD = st.sampled_from([math.inf, -math.inf, math.nan])


@dataclass(frozen=True)
class Case:
    """Gradients of 3 ranks, and what carries them."""

    gradients: tuple[tuple[float, ...], ...]
    scale: float
    wire: str | None
    strategy: str
    algorithm: str
    max_grad_norm: float | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    numel = sum(NUMELS)
    kind = draw(st.sampled_from(["good", "good", "anything", "one bad"]))
    usual = st.floats(-1.0, 1.0, width=32) if kind != "anything" else GRADIENTS
    gradients = [draw(st.lists(usual, min_size=numel, max_size=numel)) for _ in range(3)]
    if kind == "one bad":
        gradients[draw(st.integers(0, 2))][draw(st.integers(0, numel - 1))] = draw(st.one_of(BAD, GRADIENTS))
    return Case(
        tuple(map(tuple, gradients)),
        2.0 ** draw(st.integers(0, 20)),
        draw(st.sampled_from([None, "fp16", "bf16"])),
        draw(st.sampled_from(["allreduce", "ps", "dps"])),
        draw(st.sampled_from(["auto", "direct", "ring", "tree", "halving"])),
        draw(st.sampled_from([None, 0.5])),
    )


def one_step(group: Group, case: Case) -> tuple[bool, int, float, list[torch.Tensor], list[bool]]:
    """Whether there was an update, the skipped steps, the scale after, the parameters, and what has optimizer state."""
    model = torch.nn.ParameterList([torch.full((numel,), 2.0) for numel in NUMELS])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    engine = commlab.strategy(
        case.strategy,
        model,
        optimizer,
        group,
        precision="fp16",
        autocast="off",
        wire=case.wire,
        algorithm=case.algorithm,
        max_grad_norm=case.max_grad_norm,
        bucket_bytes=16,
    )
    assert engine.precision.loss_scale is not None
    engine.precision.loss_scale.value = case.scale
    mine = torch.tensor(case.gradients[group.rank]).split(NUMELS)
    engine.backward(sum((parameter * gradient).sum() for parameter, gradient in zip(model, mine, strict=True)))
    updated = engine.step()
    state = [bool(found) for found in optimizer.state.values()]
    engine.zero_grad()
    return updated, engine.skipped_steps, engine.precision.scale, [p.detach().clone() for p in model], state


HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
GOOD = (0.5,) * sum(NUMELS)


def at_the_edge(wire: str | None, *values: float, **more: Any) -> Case:
    gradients = tuple((value, *GOOD[1:]) for value in values)
    return Case(
        gradients,
        **({"scale": 1.0, "wire": wire, "strategy": "allreduce", "algorithm": "ring", "max_grad_norm": None} | more),
    )


@settings(max_examples=200)
@given(cases())
@example(at_the_edge("bf16", 3e38, 3e38, 3e38))  # each is finite, their sum is not
@example(at_the_edge(None, 3e38, 3e38, 3e38))
@example(at_the_edge(None, 3e38, 3e38, 3e38, strategy="dps", algorithm="direct"))
@example(at_the_edge("fp16", 65504.0, 65504.0, 65504.0))  # a third of it, rounded, is too much three times
@example(at_the_edge("fp16", 65504.0, 65504.0, 65504.0, strategy="ps", algorithm="direct"))
@example(at_the_edge("fp16", 1.0, 1.0, 1.0, scale=65536.0))
@example(at_the_edge("fp16", 0.5, 0.5, math.nan, algorithm="tree"))
def test_all_ranks_decide_alike_and_rightly(case: Case) -> None:
    """A step is skipped when what some rank packed, or the sum, is not finite: then nothing has changed but the scale.
    Else the update is that of the mean."""
    results = on_ranks(3, lambda group: one_step(group, case))
    updated, skipped, scale, parameters, _ = results[0]
    for other in results[1:]:
        assert other[:3] == (updated, skipped, scale)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(parameters, other[3], strict=True))
    assert skipped == (not updated)

    packed = torch.tensor(case.gradients) * case.scale
    if case.wire is not None:
        packed = packed.to(HALVES[case.wire])
    if updated:
        assert packed.isfinite().all(), "an update from gradients that are not finite"
        assert all(parameter.isfinite().all() for parameter in parameters), "it went into the parameters"
        assert scale == case.scale
        mean = packed.double().mean(0) / case.scale
        if case.max_grad_norm is not None:
            mean *= min(1.0, case.max_grad_norm / (float(mean.norm()) + 1e-6))
        # Every hop rounds numbers that are at most the mean of the absolute values; where it clips, an error anywhere
        # is in the norm, and so everywhere. fp16 has no numbers between 0 and 2^-24. Parameters of about 2 - mean are
        # rounded to fp32.
        unit = {None: 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}[case.wire]
        absolute = packed.double().abs().mean(0) / case.scale
        reach = absolute if case.max_grad_norm is None else absolute.norm()
        limit = 8 * unit * reach + 2.0**-22 / case.scale + 2.0**-22 * (2.0 + mean.abs()) + 1e-6
        got = 2.0 - torch.cat(parameters).double()
        assert ((got - mean).abs() <= limit).all()
    else:
        assert all((parameter == 2.0).all() for parameter in parameters), "a skipped step changed parameters"
        assert scale == max(1.0, case.scale / 2)
        assert not any(any(result[4]) for result in results), "a skipped step made optimizer state"
        total = packed.double().abs().sum(0)
        # Squares of numbers beyond 2^63 do not fit fp32, and then the norm does not either.
        limit = 65504 if case.wire == "fp16" else 2.0**60
        assert not (packed.isfinite().all() and (total < limit).all()), "a sound step was skipped"


def test_without_a_loss_scale_nothing_is_skipped() -> None:
    """fp32 and bf16 take what comes, as torch does."""

    def work(group: Group) -> tuple[bool, int, bool]:
        model = torch.nn.ParameterList([torch.ones(4)])
        engine = commlab.strategy("dps", model, torch.optim.SGD(model.parameters(), lr=1.0), group)
        engine.backward((model[0] * (math.inf if group.rank else 1.0)).sum())
        return engine.step(), engine.skipped_steps, bool(model[0].isfinite().any())

    assert on_ranks(2, work) == [(True, 0, False)] * 2


def test_ranks_without_samples_and_ragged_counts_are_scaled_alike() -> None:
    """The share that a rank's loss was divided by on its way is made up for, whatever its count; powers of two and
    others."""
    for counts in ((3, 5, 0), (1, 0, 0), (7, 1, 6)):
        for total_known in (True, False):

            def work(group: Group) -> torch.Tensor:
                model = torch.nn.ParameterList([torch.zeros(4)])
                engine = commlab.strategy(
                    "dps", model, torch.optim.SGD(model.parameters(), lr=1.0), group, precision="fp16", autocast="off"
                )
                count = counts[group.rank]  # noqa: B023
                total = sum(counts) if total_known else None  # noqa: B023
                loss = (model[0] * torch.arange(1.0, 5.0)).sum() * count * (group.rank + 1) if count else None
                engine.backward(loss, count, total)
                assert engine.step()
                return model[0].detach().clone()

            factor = sum(count * (rank + 1) for rank, count in enumerate(counts)) / sum(counts)
            for got in on_ranks(3, work):
                torch.testing.assert_close(got, -factor * torch.arange(1.0, 5.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", ["single", "allreduce", "ps", "dps"])
def test_one_rank_alone_skips_too(strategy: str) -> None:
    model = torch.nn.ParameterList([torch.ones(4)])
    engine = commlab.strategy(
        strategy, model, torch.optim.SGD(model.parameters(), lr=1.0), training.alone(), precision="fp16", autocast="off"
    )
    for factor, updated, scale in ((math.inf, False, 2.0**15), (1.0, True, 2.0**15), (1e38, False, 2.0**14)):
        engine.backward((model[0] * factor).sum())
        assert engine.step() is updated
        assert engine.precision.scale == scale
        engine.zero_grad()
    assert (model[0] == 0).all()
    assert engine.skipped_steps == 2


def test_the_scale_is_saved_with_the_state() -> None:
    def made() -> Any:
        model = torch.nn.ParameterList([torch.ones(4)])
        return commlab.strategy(
            "dps",
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            training.alone(),
            precision="fp16",
            autocast="off",
        )

    first = made()
    first.backward((first.model[0] * math.nan).sum())
    assert not first.step()
    second = made()
    second.load_state_dict(first.state_dict())
    assert (second.precision.scale, second.skipped_steps, second.steps) == (2.0**15, 1, 1)
