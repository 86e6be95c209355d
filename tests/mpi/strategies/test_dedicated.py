"""Dedicated servers on real transports: ``ps`` and ``dps`` against ``single``, and pulls that travel during forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import training
from mpi_ranks import Ranks
from mpi_stores import closing_stores
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference

import commlab
from commlab.errors import CommlabError, UsageError
from commlab.native.dtypes import WIRES
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.strategies import late_pulls

TEN = RAGGED * 2
CASES = [(size, servers) for size in range(2, 9) for servers in range(1, min(4, size))]


def train(group: Group, recipe: Recipe, servers: int, **options: Any) -> Run:
    """All steps of the recipe; on server ranks nothing but serving."""
    run = build("ps" if servers == 1 else "dps", group, recipe, servers=servers, **options)
    if run.engine.role == "worker":
        go_on(run, range(len(recipe.samples)))
        run.engine.close()
    return run


def assert_alike(run: Run) -> None:
    """All workers had the same parameters after every step. Collective over them."""
    if run.engine.role == "worker":
        assert len(set(gather_bytes(run.engine.group, b"".join(run.digests), "digests"))) == 1


@pytest.mark.parametrize("clipped", [None, 0.5])
@closing_stores
def test_bsp_equals_single_after_ten_steps(ranks: Ranks, clipped: float | None) -> None:
    """SGD with momentum, two groups, a scheduler; 1 to 7 workers, of which some have no samples in some steps. Every
    second number of ranks and servers is clipped."""
    recipe = Recipe(samples=TEN, max_grad_norm=clipped, accumulation=2 if clipped else 1)
    for size, servers in CASES[0 if clipped else 1 :: 2]:
        group = ranks.group(*range(size))
        if group is not None:
            run = train(group, recipe, servers, bucket_bytes=200)
            assert_alike(run)
            if run.engine.role == "worker":
                assert run.engine.group.size == size - servers
                assert_same(run, reference(recipe))


@pytest.mark.parametrize("strategy", ["ps", "dps"])
@pytest.mark.parametrize("clipped", [None, 0.5])
def test_co_located_equals_single_after_ten_steps(ranks: Ranks, strategy: str, clipped: float | None) -> None:
    """The same recipe where every rank trains and serves: each strategy on every number of ranks, and every number
    clipped under one strategy and not under the other."""
    recipe = Recipe(samples=TEN, max_grad_norm=clipped, accumulation=2 if clipped else 1)
    for size in range(2 if (strategy == "ps") == bool(clipped) else 3, 9, 2):
        group = ranks.group(*range(size))
        if group is not None:
            assert_same(training.train(strategy, group, recipe, bucket_bytes=200), reference(recipe))


@pytest.mark.parametrize("optimizer", ["AdamW", "Adagrad"])
@closing_stores
def test_other_optimizers_and_unknown_totals(ranks: Ranks, optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer, total_known=False)
    group = ranks.group(*range(5))
    if group is not None:
        run = train(group, recipe, 2)
        if run.engine.role == "worker":
            # AdamW turns rounding noise of gradients near zero into whole steps.
            assert_same(run, reference(recipe), 1e-4 if optimizer == "AdamW" else 3e-6)


@closing_stores
def test_bits_do_not_depend_on_the_run(ranks: Ranks) -> None:
    recipe = Recipe(max_grad_norm=0.5)
    group = ranks.group(*range(7))
    if group is not None:
        runs = [train(group, recipe, 3) for _ in range(2)]
        assert runs[0].digests == runs[1].digests and runs[0].norms == runs[1].norms


@pytest.mark.parametrize("wire", ["bf16", "fp16"])
@closing_stores
def test_16_bit_wires_stay_within_their_rounding(ranks: Ranks, wire: str) -> None:
    """A gradient is rounded on its way up, a value on its way down; the servers' own are never."""
    recipe = Recipe(max_grad_norm=0.5)
    group = ranks.group(*range(4))
    if group is not None:
        run = build("ps", group, recipe, servers=1, wire=wire)
        if run.engine.role == "worker":
            go_on(run, range(len(recipe.samples)))
            bits = {parameter.dtype for parameter in run.model.parameters()}
            assert bits == {torch.float32}
            coarse = training.tensors(run.model)["middle.weight"].clone()
            assert torch.equal(coarse.to(WIRES[wire]).float(), coarse), "what was pulled has 16 bits"
            run.engine.settle()
            assert not torch.equal(training.tensors(run.model)["middle.weight"], coarse), "and all bits when asked for"
            run.engine.close()
            run.norms = [None] * len(run.norms)
            wanted = replace(reference(recipe), norms=run.norms)
            assert_same(run, wanted, 6 * 2.0 ** (-8 if wire == "bf16" else -11))


@closing_stores
def test_fp16_skips_together(ranks: Ranks) -> None:
    recipe = Recipe(samples=RAGGED)
    group = ranks.group(*range(5))
    if group is not None:
        run = build("dps", group, recipe, servers=2, precision="fp16", autocast="off", wire="fp16")
        if run.engine.role == "worker":
            scale = run.engine.precision.loss_scale
            assert scale is not None
            before = training.make_model(recipe)

            def steps(value: float) -> None:
                scale.value = value
                for step in range(5):
                    training.backward(run.engine, recipe, step)
                    run.engine.step()
                    run.engine.zero_grad()

            steps(2.0**40)
            assert run.engine.skipped_steps == 5 and scale.value == 2.0**35
            run.engine.settle()
            assert torch.equal(run.model.middle.weight, before.middle.weight)
            steps(2.0**8)
            assert run.engine.skipped_steps == 5
            assert not torch.equal(run.model.middle.weight, before.middle.weight)
            run.engine.close()


@closing_stores
def test_parameters_are_changed_for_all(ranks: Ranks) -> None:
    group = ranks.group(0, 1, 2)
    if group is not None:
        run = build("ps", group, Recipe(), servers=1)
        if run.engine.role == "worker":
            go_on(run, [0])
            run.engine.update_parameters(lambda model: torch.nn.init.constant_(model.middle.bias, 5.0))
            before = run.model.middle.bias.detach().clone()
            assert (before == 5.0).all()
            go_on(run, [1])
            assert 0 < float((run.model.middle.bias - before).detach().abs().max()) < 4.0
            run.engine.close()


class Stack(torch.nn.Module):
    """Its parameters are read in the order in which they are registered; those of ``attention.out_proj`` by the module
    above it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Linear(training.WIDTH, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.middle = torch.nn.Sequential(
            torch.nn.Linear(8, 8, bias=False), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
        )
        self.columns = torch.nn.Linear(8, training.WIDTH)
        self.sneaks = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.rows(x)
        hidden = self.middle(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])
        if self.sneaks:
            return hidden @ self.columns.weight.t()
        result: torch.Tensor = self.columns(hidden)
        return result


def make_stack(group: Group, **options: Any) -> tuple[Stack, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    servers = options.pop("servers", 1)
    return model, commlab.strategy(
        "ps" if servers == 1 else "dps", model, optimizer, group, servers=servers, bucket_bytes=300, **options
    )


@pytest.mark.parametrize("clipped", [None, 0.5])
@closing_stores
def test_pulls_are_waited_for_in_the_order_of_forward(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, clipped: float | None
) -> None:
    """By the next forward and not by step(); and the bits are those of pulls that step() waits for."""
    monkeypatch.setattr(late_pulls, "UNIT_BYTES", 1)
    waits: list[str] = []
    wait = late_pulls.Pulls._wait

    def noted(self: late_pulls.Pulls, at: int) -> None:
        waits.extend(self.units[at].names)
        wait(self, at)

    monkeypatch.setattr(late_pulls.Pulls, "_wait", noted)
    group = ranks.group(*range(5))
    for servers in (1, 2) if group is not None else ():
        digests = []
        for overlaps in (False, True):
            model, engine = make_stack(group, servers=servers, overlap_pulls=overlaps, max_grad_norm=clipped)
            if engine.role == "server":
                continue
            names = [name for name, _ in model.named_parameters()]
            assert len(names) == 13
            for step in range(5):
                inputs, targets = training.samples(step, 4 + engine.group.rank)
                waits.clear()
                loss = (model(inputs) - targets).square().mean()
                # Nothing is under way before the first step, and in that one it is seen who reads what.
                assert waits == (names if overlaps and step else [])
                engine.backward(loss)
                waits.clear()
                engine.step()
                assert not waits and len(engine.strategy.pulls.on_their_way(names)) == (len(names) if overlaps else 0)
                engine.zero_grad()
            # Whoever looks at all of it waits for all of it.
            digests.append([tensor.clone() for tensor in model.state_dict().values()])
            assert not engine.strategy.pulls.on_their_way(names)
            engine.close()
        if digests:
            assert all(torch.equal(a, b) for a, b in zip(*digests, strict=True))


@closing_stores
def test_a_value_that_is_read_too_early_is_an_error(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ``columns.weight`` when another module reads it behind its back."""
    monkeypatch.setattr(late_pulls, "UNIT_BYTES", 1)
    group = ranks.group(0, 1, 2)
    if group is not None:
        model, engine = make_stack(group, overlap_pulls=True)
        if engine.role == "worker":
            for step in range(2):
                model.sneaks = step == 1
                inputs, targets = training.samples(step, 4)
                loss = (model(inputs) - targets).square().mean()
                if step == 0:
                    engine.backward(loss)
                    engine.step()
                    engine.zero_grad()
                    continue
                with pytest.raises(
                    CommlabError, match=r"in step 1 columns.weight had a gradient while .*overlap_pulls"
                ):
                    engine.backward(loss)


@closing_stores
def test_gradients_and_parameters_are_the_servers(ranks: Ranks) -> None:
    """A1, A9, B5: whatever touches a gradient on its way or a parameter says so; after each error training goes on."""
    group = ranks.group(0, 1, 2)
    if group is None:
        return
    model = torch.nn.Linear(5, 3)
    engine = commlab.strategy("ps", model, torch.optim.SGD(model.parameters(), lr=0.5), group, servers=1, wire="fp16")
    if engine.role != "worker":
        return
    with torch.no_grad():
        wanted = model.weight.clone()
    engine.backward(model(torch.ones(2, 5)).sum() * 1e9)
    with pytest.raises(CommlabError, match="could not travel on wire fp16"):
        engine.step()
    engine.backward(model(torch.ones(2, 5)).sum())
    with pytest.raises(UsageError, match="ps with dedicated servers: the gradient of parameter 'weight' is on its way"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(UsageError, match="only the servers have the reduced gradient"):
        engine.reduced_gradients()
    model.weight.grad = None
    with pytest.raises(UsageError, match=r"p\.grad of 'weight' was set to something else"):
        engine.step()
    late = model(torch.ones(2, 5, requires_grad=True)).sum()
    engine.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    # Values below 2 come back in fp16: half a step is 2^-11.
    assert torch.allclose(model.weight, wanted - 0.5 * 2, rtol=0, atol=2**-11)
    with torch.no_grad():
        model.weight.mul_(2)
    engine.backward(model(torch.ones(2, 5)).sum())
    with pytest.raises(UsageError, match=r"'weight' was written between two steps.*the next pull overwrites it"):
        engine.step()
    engine.step()
    engine.close()
