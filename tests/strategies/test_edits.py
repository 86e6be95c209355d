"""What users do to gradients between backward and step: it counts exactly, or is refused by name on every rank (kind
A1)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import training
from crew import Crew, by_turns, groups
from training import EVEN, RAGGED, Recipe, Run, assert_same

import commlab
from commlab.errors import AgreedError, CommlabError, DisagreementError, UsageError
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine

Edit = Callable[[Engine], object]


@pytest.fixture(scope="module")
def crews() -> Iterator[dict[int, Crew]]:
    made = {size: Crew(size) for size in (1, 2, 3, 4)}
    yield made
    for crew in made.values():
        crew.close()


def parameters(engine: Engine) -> list[torch.nn.Parameter]:
    return [item.tensor for item in engine.parameters]


def clip_norm(engine: Engine) -> None:
    torch.nn.utils.clip_grad_norm_(parameters(engine), 0.05)


def clip_norm_one_by_one(engine: Engine) -> None:
    torch.nn.utils.clip_grad_norm_(parameters(engine), 0.05, foreach=False)


def clip_value(engine: Engine) -> None:
    torch.nn.utils.clip_grad_value_(parameters(engine), 1e-3)


def drop_some(engine: Engine) -> None:
    for item in engine.parameters:
        if "middle" in item.name:
            item.tensor.grad = None


def replace_some(engine: Engine) -> None:
    for item in engine.parameters:
        if item.name in ("middle.weight", "turned") and item.tensor.grad is not None:
            item.tensor.grad = item.tensor.grad.sign() * 1e-2


def add(engine: Engine) -> None:
    for item in engine.parameters:
        if item.tensor.grad is not None and not item.name.startswith(("some", "spare")):
            item.tensor.grad.add_(item.tensor.detach(), alpha=0.1)


def clip_data(engine: Engine) -> None:
    """Not counted by torch."""
    for parameter in parameters(engine):
        if parameter.grad is not None:
            parameter.grad.data.clamp_(-1e-3, 1e-3)


EDITS = (clip_data, clip_norm, clip_value, drop_some, replace_some, add)


def build(strategy: str, group: Group, recipe: Recipe, **options: Any) -> Run:
    """As :func:`training.build`, on a rank that is a thread."""
    with by_turns:
        model = training.make_model(recipe)
    return training.build(strategy, group, recipe, model, **options)


def run_with(edit: Edit, strategy: str, group: Group, recipe: Recipe, **options: Any) -> Run:
    run = build(strategy, group, recipe, **options)
    for step in range(len(recipe.samples)):
        training.backward(run.engine, recipe, step)
        edit(run.engine)
        run.engine.step()
        run.digests.append(training.digest(run.model))
        run.norms.append(run.engine.grad_norm)
        run.engine.zero_grad()
        run.scheduler.step()
    return run


@functools.cache
def single(edit: Edit, recipe: Recipe) -> Run:
    return run_with(edit, "single", training.alone(), recipe)


@pytest.mark.parametrize("max_grad_norm", [None, 0.03])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_of_whole_gradients_count_exactly(
    crews: dict[int, Crew], edit: Edit, max_grad_norm: float | None
) -> None:
    """A1. Parameters that nobody, or not every rank, has used, ranks without samples, ragged counts: see training.py.
    The norm of max_grad_norm is that of what the optimizer sees."""
    recipe = Recipe(samples=RAGGED[:3], max_grad_norm=max_grad_norm)
    wanted = single(edit, recipe)
    for size, bucket_bytes in ((1, 1), (4, 300)) if max_grad_norm else ((2, 300), (3, 10**9)):
        ranks = groups(size)
        found = crews[size].all(
            lambda rank: run_with(edit, "allreduce", ranks[rank], recipe, bucket_bytes=bucket_bytes)  # noqa: B023
        )
        assert len({tuple(run.digests) for run in found}) == 1
        # clip_grad_norm_ adds squares in fp32.
        assert_same(found[-1], wanted, 1e-5)


def test_without_an_edit_the_edited_run_would_differ() -> None:
    """The edits above do something."""
    recipe = Recipe(samples=RAGGED[:3])
    plain = training.tensors(training.reference(recipe).model)
    for edit in EDITS:
        assert training.difference(training.tensors(single(edit, recipe).model), plain)[0] > 1e-3


@pytest.mark.parametrize("edit", [clip_norm, clip_value, drop_some, add], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("wire", ["bf16"])
def test_edits_count_where_the_wire_has_16_bits(crews: dict[int, Crew], edit: Edit, wire: str) -> None:
    """A1: what was edited never travels, so that nothing but the reduction is rounded."""
    recipe = Recipe(samples=EVEN[:2], counted=False)
    ranks = groups(3)
    found = crews[3].all(lambda rank: run_with(edit, "allreduce", ranks[rank], recipe, wire=wire))
    assert len({tuple(run.digests) for run in found}) == 1
    assert_same(found[0], single(edit, recipe), 2**-6)


def outcome(task: Callable[[int], Any]) -> Callable[[int], Any]:
    """What ``task(rank)`` returns, or the CommlabError that it raises."""

    def run(rank: int) -> Any:
        try:
            return task(rank)
        except CommlabError as error:
            return error

    return run


def on_rank(only: int, edit: Edit) -> Callable[[int, Engine], object]:
    return lambda rank, engine: edit(engine) if rank == only else None


def noise(rank: int, engine: Engine) -> None:
    for item in engine.parameters:
        if item.name == "middle.weight" and item.tensor.grad is not None:
            item.tensor.grad.add_(1e-6 * (rank + 1))


@pytest.mark.parametrize(
    "edit, name",
    [
        (on_rank(1, clip_value), "turned"),
        (on_rank(1, clip_data), "turned"),
        (noise, "middle.weight"),
        (on_rank(2, drop_some), "middle"),
    ],
    ids=["one rank clips", "one rank clips data", "other noise on each", "one rank drops"],
)
def test_edits_that_differ_between_ranks_are_named_everywhere(
    crews: dict[int, Crew], edit: Callable[[int, Engine], object], name: str
) -> None:
    """A1: replicas would drift apart. Nothing is updated, and the next step goes on."""
    ranks = groups(3)
    recipe = Recipe(samples=EVEN)
    runs = crews[3].all(lambda rank: build("allreduce", ranks[rank], recipe))

    def step(rank: int) -> bytes:
        training.backward(runs[rank].engine, recipe, 0)
        edit(rank, runs[rank].engine)
        runs[rank].engine.step()
        return b""

    before = training.digest(runs[0].model)
    for error in crews[3].all(outcome(step)):
        assert isinstance(error, DisagreementError)
        assert f"{name}" in str(error) and "not alike on all ranks" in str(error) and "ranks " in str(error)
    assert {training.digest(run.model) for run in runs} == {before}
    crews[3].all(lambda rank: training.go_on(runs[rank], range(3)))
    assert_same(runs[1], training.go_on(build("single", training.alone(), recipe), range(3)))


TOUCHES: dict[str, Edit] = {
    "clip_grad_norm_": clip_norm,
    "one by one": clip_norm_one_by_one,
    "clip_grad_value_": clip_value,
    "add_": lambda engine: parameters(engine)[0].grad.add_(1),  # type: ignore[union-attr]
    "norm for logging": lambda engine: parameters(engine)[0].grad.norm().item(),  # type: ignore[union-attr]
    "data": lambda engine: parameters(engine)[0].grad.data.mul_(2),  # type: ignore[union-attr]
    "numpy": lambda engine: parameters(engine)[0].grad.numpy(),  # type: ignore[union-attr]
    "the optimizer's parameters": lambda engine: torch.nn.utils.clip_grad_norm_(
        engine.optimizer.param_groups[0]["params"], 1.0
    ),
    "model.zero_grad to zeros": lambda engine: engine.model.zero_grad(set_to_none=False),
    "another backward": lambda engine: engine.model(torch.ones(2, training.WIDTH)).sum().backward(),
}


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_gradients_that_are_on_their_way_say_so(strategy: str, touch: str) -> None:
    """A1: no effect without a word. The step goes on as if nothing had been tried."""
    run = build(strategy, training.alone(), Recipe(samples=EVEN))
    training.backward(run.engine, run.recipe, 0)
    with pytest.raises(
        UsageError, match=rf"strategy {strategy}: the gradient of parameter '\S+' is on its way.*max_grad"
    ):
        TOUCHES[touch](run.engine)
    gradient = parameters(run.engine)[0].grad
    assert gradient is not None and gradient.shape == parameters(run.engine)[0].shape
    assert "on its way" in repr(gradient) and "on its way" in f"{gradient}"
    run.engine.step()
    assert all(parameter.grad is None for parameter in run.model.parameters())
    run.engine.zero_grad()
    run.scheduler.step()
    training.go_on(run, [1, 2])
    wanted = training.go_on(build("single", training.alone(), run.recipe), range(3))
    assert training.difference(training.tensors(run.model), training.tensors(wanted.model))[0] < 1e-6


CALLS: dict[str, tuple[Edit, str]] = {
    "step": (lambda engine: engine.optimizer.step(), "call engine.step()"),
    "zero_grad": (lambda engine: engine.optimizer.zero_grad(), "call it after step()"),
    "zero_grad to zeros": (lambda engine: engine.optimizer.zero_grad(set_to_none=False), "call it after step()"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("strategy", ["allreduce", "ps", "dps"])
def test_the_optimizers_own_calls_are_refused(strategy: str, call: str) -> None:
    """A1: between backward and step, under every strategy; the step goes on as if nothing had been tried."""
    run = build(strategy, training.alone(), Recipe(samples=EVEN))
    training.backward(run.engine, run.recipe, 0)
    touch, way_out = CALLS[call]
    with pytest.raises(UsageError, match=re.escape(way_out)):
        touch(run.engine)
    run.engine.step()
    run.engine.zero_grad()
    run.scheduler.step()
    training.go_on(run, [1, 2])
    wanted = training.go_on(build("single", training.alone(), run.recipe), range(3))
    assert training.difference(training.tensors(run.model), training.tensors(wanted.model))[0] < 1e-6


TAMPERS: dict[str, Edit] = {
    "p.grad = None": drop_some,
    "model.zero_grad": lambda engine: engine.model.zero_grad(),
    "p.grad = other": lambda engine: setattr(engine.model.middle.weight, "grad", torch.zeros(6, 7)),
}


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("tamper", TAMPERS)
@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_gradients_that_were_taken_away_are_named_on_every_rank(
    crews: dict[int, Crew], strategy: str, tamper: str, everywhere: bool
) -> None:
    """A1: and nobody is left waiting, nothing is updated, and the next step goes on."""
    ranks, recipe = groups(2), Recipe(samples=EVEN)
    runs = crews[2].all(lambda rank: build(strategy, ranks[rank], recipe))

    def step(rank: int) -> None:
        training.backward(runs[rank].engine, recipe, 0)
        if everywhere or rank == 0:  # under ps rank 0 has all of the optimizer's parameters
            TAMPERS[tamper](runs[rank].engine)
        runs[rank].engine.step()

    before = training.digest(runs[0].model)
    for error in crews[2].all(outcome(step)):
        assert isinstance(error, UsageError)
        assert "p.grad of '" in str(error) and "rank 0" in str(error) and "reduced_gradients" in str(error)
    assert {training.digest(run.model) for run in runs} == {before}
    crews[2].all(lambda rank: training.go_on(runs[rank], range(2)))
    assert_same(runs[1], training.go_on(build("single", training.alone(), recipe), range(2)))


MOVES: dict[str, Edit] = {
    "p.data = ?": lambda engine: setattr(engine.model.middle.weight, "data", engine.model.middle.weight.data.clone()),
    "half()": lambda engine: engine.model.half().float(),
    "another Parameter": lambda engine: setattr(engine.model, "middle", torch.nn.Linear(7, 6)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_a_parameter_that_was_moved_is_named_on_every_rank(crews: dict[int, Crew], strategy: str, move: str) -> None:
    """A8: on the rank alone that updates it, others would wait; and nothing is updated."""
    ranks, recipe = groups(2), Recipe(samples=EVEN)
    runs = crews[2].all(lambda rank: build(strategy, ranks[rank], recipe))

    def step(rank: int) -> None:
        training.backward(runs[rank].engine, recipe, 0)
        if rank == 1:
            MOVES[move](runs[rank].engine)
        runs[rank].engine.step()

    before = training.digest(runs[0].model)
    for error in crews[2].all(outcome(step)):
        assert isinstance(error, AgreedError)
        assert re.search(r"^rank 1: parameter '\S+' was given other memory after commlab\.strategy\(\)", str(error))
        assert str(error).endswith("; nothing was updated")
    assert training.digest(runs[0].model) == before


def edit_pieces(engine: Engine) -> None:
    """A norm per layer, noise, clipping by value."""
    norms = engine.gradient_norms()
    for piece in engine.reduced_gradients():
        piece.tensor.mul_(1e-2 / (norms[piece.name] + 1e-6))
        piece.tensor.add_(piece.draw(lambda whole, generator: whole.normal_(0, 2e-3, generator=generator)))
        piece.tensor.clamp_(-5e-3, 5e-3)


@pytest.mark.parametrize("max_grad_norm", [None, 0.03])
@pytest.mark.parametrize("strategy", ["allreduce", "ps", "dps"])
def test_reduced_gradients_are_edited_under_every_strategy(
    crews: dict[int, Crew], strategy: str, max_grad_norm: float | None
) -> None:
    """A1: value clipping, noise and norms per layer are those of one rank, wherever the pieces lie."""
    recipe = Recipe(samples=RAGGED[:4], max_grad_norm=max_grad_norm)
    wanted = single(edit_pieces, recipe)
    for size, bucket_bytes in ((1, 300), (4, 10**9)) if max_grad_norm else ((2, 1), (3, 300)):
        ranks = groups(size)
        found = crews[size].all(
            lambda rank: run_with(edit_pieces, strategy, ranks[rank], recipe, bucket_bytes=bucket_bytes)  # noqa: B023
        )
        assert len({tuple(run.digests) for run in found}) == 1
        assert_same(found[0], wanted, 1e-5)


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["allreduce", "ps", "dps"])
def test_reduced_gradients_are_unscaled_and_edits_are_not_rounded_to_the_wire(
    crews: dict[int, Crew], strategy: str, wire: str
) -> None:
    """A1: under a loss scale pieces have the true values; what is written there reaches the parameters in fp32."""
    ranks = groups(3)

    def train(rank: int) -> tuple[torch.Tensor, float | None]:
        model = torch.nn.Linear(5, 7, bias=False)
        with torch.no_grad():
            model.weight.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine = commlab.strategy(
            strategy, model, optimizer, ranks[rank], precision="fp16", autocast="off", wire=wire, max_grad_norm=1e9
        )
        engine.backward(model(torch.full((1, 5), 2.0**-7)).sum())
        for piece in engine.reduced_gradients():
            assert (piece.tensor == 2.0**-7).all() and piece.tensor.dtype == torch.float32
            assert piece.replicated == (strategy == "allreduce")
            assert piece.whole == (piece.stop - piece.start == 35)
            piece.tensor.copy_(torch.arange(35.0)[piece.start : piece.stop].view(piece.tensor.shape) / 3)
        assert engine.step()
        return -model.weight.detach().view(-1), engine.grad_norm

    for found, norm in crews[3].all(train):
        # Multiplied by the loss scale, a power of two, and divided by it: no rounding.
        assert torch.equal(found, torch.arange(35.0) / 3)
        assert norm == pytest.approx(float((torch.arange(35.0).double() / 3).norm()), rel=1e-6)


def test_pieces_are_for_the_time_between_backward_and_step() -> None:
    """A1."""
    for strategy in ("single", "allreduce", "dps"):
        run = build(strategy, training.alone(), Recipe(samples=EVEN))
        with pytest.raises(UsageError, match=r"reduced_gradients\(\) is for the time between backward"):
            run.engine.reduced_gradients()
        training.backward(run.engine, run.recipe, 0)
        pieces = run.engine.reduced_gradients()
        assert run.engine.reduced_gradients() is pieces
        assert {piece.name for piece in pieces} == set(run.engine.gradient_norms()) - {"empty"} | {
            piece.name for piece in pieces if piece.name == "empty"
        }
        assert not any("spare" in piece.name for piece in pieces), "nobody has used it"
        run.engine.step()
        with pytest.raises(UsageError, match=r"gradient_norms\(\) is for the time between backward"):
            run.engine.gradient_norms()
