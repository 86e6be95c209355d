"""Ranks that are not in the same step, or would not update alike, are told so, all of them, before anything is updated.

On one rank in turn of three, under every strategy that commlab itself exchanges for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from coupled import (
    SIZE,
    batch,
    build,
    couple,
    errors_of,
    every_strategy,
    loss_of,
    make_step,
    model_of,
    two_groups,
    values,
)
from crew import Crew, groups

import commlab
from commlab.errors import UsageError
from commlab.precision.loss_scale import LossScale
from commlab.strategies.engine import Engine
from commlab.strategies.hypers import HyperParameters, text_of


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(SIZE)
    yield made
    made.close()


def all_told(crew: Crew, engines: list[Engine], task: Callable[[int], object], *words: str) -> None:
    """``task`` ends in DisagreementError with all ``words`` on every rank, and no parameter has changed."""
    before = [values(engine) for engine in engines]
    told = errors_of(crew, task)
    for rank, text in enumerate(told):
        assert not [word for word in words if word not in text], (rank, text)
    for engine, old in zip(engines, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values(engine), old, strict=True)), "nothing was updated"


def plateau(engine: Engine) -> None:
    engine.optimizer.param_groups[1]["lr"] *= 0.1


def set_hyper(key: str, value: object) -> Callable[[Engine], None]:
    def change(engine: Engine) -> None:
        engine.optimizer.param_groups[0][key] = value

    return change


CHANGES: dict[str, tuple[Callable[[Engine], None], tuple[str, ...]]] = {
    "lr by a scheduler": (plateau, ("'lr' of parameter group 1", "rank 1: 0.002", "ranks 0, 2: 0.02")),
    "betas": (set_hyper("betas", (0.8, 0.999)), ("'betas' of parameter group 0", "rank 1: (0.8, 0.999)")),
    "weight decay": (set_hyper("weight_decay", 0.5), ("'weight_decay' of parameter group 0", "rank 1: 0.5")),
    "maximize": (set_hyper("maximize", True), ("'maximize' of parameter group 0", "rank 1: True")),
    "lr as a tensor": (set_hyper("lr", torch.tensor(0.25)), ("'lr' of parameter group 0", "rank 1: 0.25")),
    "a key of the user's own": (set_hyper("layer", "last"), ("'layer' of parameter group 0", "ranks 0, 2: none")),
    "none": (set_hyper("foreach", True), ("'foreach' of parameter group 0", "rank 1: True", "ranks 0, 2: None")),
}


@every_strategy
@pytest.mark.parametrize("name", CHANGES)
def test_hyper_parameters_that_differ_are_named(crew: Crew, strategy: str, name: str) -> None:
    """A3: hyper-parameters differ between ranks."""
    change, words = CHANGES[name]
    engines = build(crew, strategy, max_grad_norm=1.0)
    crew.all(lambda rank: make_step(engines[rank], rank, 0))
    change(engines[1])
    all_told(crew, engines, lambda rank: make_step(engines[rank], rank, 1), "step 1", *words, "Nothing was updated")
    # The step that was refused is dropped; made alike, ranks can make the next one.
    for rank in (0, 2):
        change(engines[rank])
    assert crew.all(lambda rank: make_step(engines[rank], rank, 2)) == [True] * SIZE


@every_strategy
def test_totals_that_differ_are_named(crew: Crew, strategy: str) -> None:
    """A3: the caller's totals differ."""
    engines = build(crew, strategy)

    def step(rank: int, total: float | None) -> bool:
        engines[rank].backward(loss_of(engines[rank], rank, 0), 2, total)
        return engines[rank].step()

    all_told(crew, engines, lambda rank: step(rank, 6 + (rank == 2)), "ranks 0, 1: 6", "rank 2: 7", "total")


@pytest.mark.parametrize("strategy", ["allreduce", "dps"])
@pytest.mark.parametrize(
    "option, value, words",
    [
        ("max_grad_norm", 2.0, "max_grad_norm, rank 0: 1.0, ranks 1, 2: 2.0"),
        ("wire", "fp16", "wire, rank 0: None, ranks 1, 2: 'fp16'"),
        ("loss_scale", LossScale(8.0), "loss_scale, rank 0: None, ranks 1, 2: LossScale"),
        ("buffers", "mean", "buffers, rank 0: 'broadcast', ranks 1, 2: 'mean'"),
    ],
)
def test_options_that_differ_are_named(crew: Crew, strategy: str, option: str, value: Any, words: str) -> None:
    """A3: options differ between ranks."""
    ranks = groups(SIZE)

    def one(rank: int) -> Engine:
        options: dict[str, Any] = {"max_grad_norm": 1.0, **({option: value} if rank else {})}
        model = model_of()
        return commlab.strategy(strategy, model, two_groups(model), ranks[rank], **options)

    told = errors_of(crew, one)
    assert all(words in text for text in told), told


def test_optimizers_that_differ_are_named(crew: Crew) -> None:
    """A3: the classes and groups of optimizers differ between ranks."""
    ranks = groups(SIZE)

    def classes(rank: int) -> Engine:
        model = model_of()
        kind = torch.optim.SGD if rank == 1 else torch.optim.AdamW
        return couple("allreduce", model, two_groups(model, kind), ranks[rank])

    told = errors_of(crew, classes)
    assert all("the optimizer's class: ranks 0, 2: 'AdamW', rank 1: 'SGD'" in text for text in told), told

    again = groups(SIZE)

    def members(rank: int) -> Engine:
        model = model_of()
        parameters = list(model.parameters())
        cut = 2 if rank == 2 else 1
        optimizer = torch.optim.SGD([{"params": parameters[:cut]}, {"params": parameters[cut:]}], lr=0.1)
        return couple("allreduce", model, optimizer, again[rank])

    told = errors_of(crew, members)
    assert all("entry 1 of parameter group 0: ranks 0, 1: none, rank 2: '0.bias'" in text for text in told), told


@every_strategy
def test_schedulers_that_agree_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A3: values that change in every step, alike on all ranks, in spite of another order of keys and of whole numbers
    that are floats elsewhere."""
    engines = build(crew, strategy)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(engine.optimizer, 0.1, total_steps=9) for engine in engines]
    entry = engines[2].optimizer.param_groups[0]
    entry["weight_decay"] = 0
    for rank in (0, 1):
        engines[rank].optimizer.param_groups[0]["weight_decay"] = 0.0
    turned = dict(reversed(list(entry.items())))
    entry.clear()
    entry.update(turned)
    for step in range(5):
        assert all(crew.all(lambda rank: make_step(engines[rank], rank, step)))  # noqa: B023 - called here
        for schedule in schedules:
            schedule.step()
    first = values(engines[0])
    assert all(torch.equal(a, b) for engine in engines for a, b in zip(values(engine), first, strict=True))


# Steps: what a rank does alone.


def skip_before_forward(engine: Engine, _: int, __: int) -> None:
    engine.zero_grad()


def catch_in_forward(engine: Engine, rank: int, step: int) -> None:
    hook = engine.model[1].register_forward_pre_hook(_out_of_memory)
    with pytest.raises(MemoryError):
        loss_of(engine, rank, step)
    hook.remove()


def catch_in_backward(engine: Engine, rank: int, step: int) -> None:
    hidden = engine.model[0](batch(rank, step))
    hidden.register_hook(_out_of_memory)
    with pytest.raises(MemoryError):
        # Before the gradient of the first layer, and so before the only bucket is full.
        engine.backward(engine.model[2](hidden.tanh()).square().sum())
    engine.zero_grad()


def skip_after_forward(engine: Engine, rank: int, step: int) -> None:
    loss_of(engine, rank, step)


def _out_of_memory(*_: Any) -> None:
    raise MemoryError("as if")


@every_strategy
@pytest.mark.parametrize(
    "skip, did",
    [
        (skip_before_forward, "(it called zero_grad() 2 times since its last step)"),
        (catch_in_forward, "(1 of its forward passes ended in an exception)"),
        (catch_in_backward, "zero_grad() 2 times since its last step and it called backward() 2 times since its last"),
        (skip_after_forward, "(it called the model more often than its losses need)"),
    ],
)
def test_a_rank_that_drops_a_step_is_named_at_the_next_one(
    crew: Crew, strategy: str, skip: Callable[[Engine, int, int], None], did: str
) -> None:
    """A19: one rank skips a step, or catches an exception, and goes on."""
    if strategy == "external" and skip is catch_in_backward:
        pytest.skip("its library has exchanged a part of the gradient, or waits")
    engines = build(crew, strategy)
    for step in (0, 1):
        crew.all(lambda rank: make_step(engines[rank], rank, step))  # noqa: B023 - called here

    def go_on(rank: int) -> None:
        if rank == 1:
            skip(engines[rank], rank, 2)
        make_step(engines[rank], rank, 2 + (rank == 1))

    all_told(crew, engines, go_on, "rank 1 is in step 3", "ranks 0, 2 are in step 2", "caught an exception", did)


@every_strategy
def test_steps_that_all_ranks_drop_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A19: an exception on every rank."""
    engines = build(crew, strategy)
    crew.all(lambda rank: make_step(engines[rank], rank, 0))
    crew.all(lambda rank: catch_in_forward(engines[rank], rank, 1))
    assert all(crew.all(lambda rank: make_step(engines[rank], rank, 2)))
    crew.all(lambda rank: skip_before_forward(engines[rank], rank, 3))
    assert all(crew.all(lambda rank: make_step(engines[rank], rank, 4)))


@every_strategy
def test_forward_passes_of_any_pattern_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A19: ragged micro-batches, ranks without samples, sequences of different lengths, passes without gradients."""
    engines = build(crew, strategy)

    def step(rank: int, step: int) -> bool:
        engine = engines[rank]
        for _ in range(rank + step):
            with engine.no_sync():
                engine.backward(loss_of(engine, rank, step), 1)
        with torch.no_grad():
            loss_of(engine, rank, step) if rank == 2 else None
        if rank == step:
            engine.backward(None, 0)
        else:
            engine.backward(loss_of(engine, rank, step), 1)
        updated = engine.step()
        engine.zero_grad()
        return updated

    for number in range(4):
        assert all(crew.all(lambda rank: step(rank, number)))  # noqa: B023 - called here

    def recurrent(rank: int, step: int) -> bool:
        engine = engines[rank]
        engine.backward(sum(loss_of(engine, rank, at) for at in range(1 + (rank * step) % 4)))
        updated = engine.step()
        engine.zero_grad()
        return updated

    engines = build(crew, strategy)
    for number in range(1, 5):
        assert all(crew.all(lambda rank: recurrent(rank, number)))  # noqa: B023 - called here


@every_strategy
def test_numbers_of_the_callers_own_decide(crew: Crew, strategy: str) -> None:
    """A19: a loop that gives its steps' numbers; a forward pass that was repeated is no dropped step then."""
    engines = build(crew, strategy)
    crew.all(lambda rank: make_step(engines[rank], rank, 0, number=70))

    def retried(rank: int) -> bool:
        if rank == 1:
            catch_in_forward(engines[rank], rank, 1)
        return make_step(engines[rank], rank, 1, number=71)

    assert all(crew.all(retried))
    all_told(
        crew,
        engines,
        lambda rank: make_step(engines[rank], rank, 2, number=72 + (rank == 1)),
        "rank 1 is in step 73, ranks 0, 2 are in step 72",
    )
    engines = build(crew, strategy)
    all_told(
        crew,
        engines,
        lambda rank: make_step(engines[rank], rank, 0, **({"number": 5} if rank == 2 else {})),
        "some ranks have given engine.step() a number",
    )


def test_turns_give_steps_their_numbers(crew: Crew) -> None:
    """A19: a rank that skips a step of ``engine.turns()``, with nothing else to see."""
    engines = build(crew, "allreduce")

    def loop(rank: int) -> None:
        for step, _ in engines[rank].turns(0, 4):
            if rank != 1 or step != 2:
                make_step(engines[rank], rank, step)

    told = errors_of(crew, loop)
    assert all("rank 1 is in step 3, ranks 0, 2 are in step 2" in text for text in told), told


# The digest of hyper-parameters.


def test_the_digest_sees_every_change() -> None:
    """A3: values that are written in place, and values of every type."""
    model = model_of()
    optimizer = two_groups(model)
    scale = LossScale(4.0)
    hypers = HyperParameters(optimizer, scale)
    entry = optimizer.param_groups[0]
    seen = {hypers.digest()}
    assert hypers.digest() in seen

    def changed() -> None:
        found = hypers.digest()
        assert found not in seen and hypers.digest() == found
        seen.add(found)

    entry["lr"] = math.nextafter(0.01, 1)
    changed()
    entry["lr"] = torch.tensor(0.5)
    changed()
    entry["lr"].fill_(0.25)
    changed()
    entry["lr"].data.mul_(2).add_(1)
    changed()
    entry["betas"] = [0.5, 0.6]
    changed()
    entry["betas"][1] = 0.7
    changed()
    entry["betas"] = (0.9, torch.tensor(0.99))
    changed()
    entry["betas"][1].fill_(0.98)
    changed()
    entry["mode"] = "min"
    changed()
    entry["mode"] = "max"
    changed()
    entry["mode"] = None
    changed()
    entry["big"] = 10**400  # beyond float64
    changed()
    entry["big"] += 1
    changed()
    del entry["big"], entry["mode"]
    assert hypers.digest() in seen
    entry["nan"] = math.nan
    changed()
    entry["eps"] = torch.tensor([1.0, 2.0])
    changed()
    scale.value = 2.0
    changed()
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    changed()


def test_the_digest_is_one_for_equal_values() -> None:
    """A3: what two ranks write differently, and update with alike."""

    def digest(**values: Any) -> bytes:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        optimizer.param_groups[0].update(values)
        return HyperParameters(optimizer, None).digest()

    assert digest(lr=1) == digest(lr=1.0) == digest(lr=True)
    assert digest(nesterov=False) == digest(nesterov=0)
    assert digest(lr=0.1) == digest()
    assert digest(lr=math.nan) == digest(lr=float("nan"))
    assert digest(lr=torch.tensor(0.5)) == digest(lr=torch.tensor(0.5, dtype=torch.float64))
    assert digest(hook=test_the_digest_sees_every_change) != digest(hook=all_told)
    assert text_of({"b": [1, 2.5], "a": torch.float16}) == "{a: torch.float16, b: (1.0, 2.5)}"


# Counts.


@pytest.mark.parametrize("strategy", ["single", "allreduce", "dps"])
@pytest.mark.parametrize("bad", [-1, -0.25, math.nan, math.inf, "many", torch.ones(2), [3]])
def test_counts_that_are_none_are_refused(strategy: str, bad: Any) -> None:
    """A11: counts that are negative, NaN, infinite, or no numbers."""
    model = model_of()
    engine = commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), groups(1)[0])
    for arguments in ((bad,), (1.0, bad)):
        with pytest.raises(
            UsageError, match=rf"rank 0: backward\(\) was given {'count' if len(arguments) < 2 else 'total'}="
        ):
            engine.backward(engine.model(batch(0, 0)).sum(), *arguments)
    with pytest.raises(UsageError, match=r"total=3 without a count"):
        engine.backward(engine.model(batch(0, 0)).sum(), None, 3)


WEIGHTS = ((0.7, 0.0), (0.05, 0.1), (0.0, 0.31))
"""Of two samples of each rank: sums below 1, and a rank without any in its first micro-batch."""


@every_strategy
@pytest.mark.parametrize("total_known", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.25, 2.0**40])
def test_weights_count_as_they_are(crew: Crew, strategy: str, total_known: bool, factor: float) -> None:
    """A11: float counts, and totals below 1: against the weighted mean in float64."""
    engines = build(crew, strategy)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64) * factor
    total = float(weights.sum()) if total_known else None
    twin = model_of().double()
    inputs = torch.stack([batch(rank, 0) for rank in range(SIZE)]).double()
    losses = twin(inputs).square().sum(-1)
    ((losses * weights).sum() / weights.sum()).backward()
    gradients = [parameter.grad for parameter in twin.parameters()]

    def sgd(rank: int) -> list[torch.Tensor]:
        engine = engines[rank]
        for at in (0, 1):
            loss = (engine.model(batch(rank, 0)[at]).square().sum() * weights[rank, at]).float()
            if at == 0:
                with engine.no_sync():
                    engine.backward(loss, float(weights[rank, at]), total)
            else:
                engine.backward(loss, weights[rank, at], total)
        engine.step()
        return values(engine)

    for engine in engines:
        for entry in engine.optimizer.param_groups:
            entry.update(lr=0.125, betas=(0.0, 0.0), eps=1e30, weight_decay=0.0)  # AdamW: lr / eps x gradient
            entry["eps"], entry["lr"] = 2.0**20, 2.0**17
    before = model_of()
    for after in crew.all(sgd):
        for was, now, gradient in zip(before.parameters(), after, gradients, strict=True):
            assert gradient is not None
            wanted = was.double() - 2.0**17 * gradient / (gradient.abs() + 2.0**20)
            assert torch.allclose(now.double(), wanted, rtol=3e-6, atol=3e-6)


@every_strategy
def test_whole_counts_are_exact(crew: Crew, strategy: str) -> None:
    """A11: whole numbers up to 2^53, whose sum float32 would round."""
    ranks = groups(SIZE)
    counts = [2**24 + 1, 2**52 - 2**24 - 1, 3]

    def one(rank: int) -> float:
        model = torch.nn.Linear(1, 1, bias=False).double()
        engine = couple(strategy, model, torch.optim.SGD(model.parameters(), lr=1.0), ranks[rank])
        with torch.no_grad():
            before = float(engine.model.weight.detach())
        engine.backward(engine.model(torch.full((1, 1), float(2**52 + 3), dtype=torch.float64)).sum(), counts[rank])
        engine.step()
        return before - float(engine.model.weight.detach())

    for moved in crew.all(one):
        assert moved == pytest.approx(SIZE, rel=1e-15)


@every_strategy
@pytest.mark.parametrize("total", [None, 0, 0.0])
def test_a_global_count_of_nothing_gives_no_gradient(crew: Crew, strategy: str, total: float | None) -> None:
    """A11: a batch all of which is masked."""
    engines = build(crew, strategy, max_grad_norm=1.0)
    before = values(engines[0])
    for engine in engines:
        for entry in engine.optimizer.param_groups:
            entry["weight_decay"] = 0.0

    def step(rank: int) -> float | None:
        engines[rank].backward(loss_of(engines[rank], rank, 0), 0, total)
        engines[rank].step()
        return engines[rank].grad_norm

    assert crew.all(step) == [0.0] * SIZE
    assert all(torch.equal(a, b) for engine in engines for a, b in zip(values(engine), before, strict=True))
