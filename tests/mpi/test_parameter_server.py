"""Dedicated servers on real transports: ``ps`` and ``dps`` against ``single``, and ``ParameterServer`` by itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
import training
from conftest import Ranks
from training import RAGGED, Recipe, Run, assert_same, build, go_on, reference

import commlab
from commlab.collectives.group import Group
from commlab.errors import CommlabError, DisagreementError, UsageError
from commlab.gradients.wire import WIRES
from commlab.ps.store import ParameterServer
from commlab.strategies import pulls

TEN = RAGGED * 2
CASES = [(size, servers) for size in range(2, 9) for servers in range(1, min(4, size))]


Test = TypeVar("Test", bound=Callable[..., None])


def closing_stores(test: Test) -> Test:
    """A worker whose assertion has failed must not leave its servers serving: the verdict is collective."""

    @functools.wraps(test)
    def wrapped(*args: Any, **options: Any) -> None:
        made: list[ParameterServer] = []
        build_store = ParameterServer.__init__

        def remembered(self: ParameterServer, *args: Any, **options: Any) -> None:
            made.append(self)
            build_store(self, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ParameterServer, "__init__", remembered)
            try:
                test(*args, **options)
            finally:
                for store in made:
                    if getattr(store, "_client", None) is not None:
                        store.close()

    return wrapped  # type: ignore[return-value]


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
        assert len(set(run.engine.group.gather_bytes(b"".join(run.digests), "digests"))) == 1


@pytest.mark.parametrize("clipped", [None, 0.5])
@closing_stores
def test_bsp_equals_single_after_ten_steps(ranks: Ranks, clipped: float | None) -> None:
    """SGD with momentum, two groups, a scheduler; 1 to 7 workers, of which some have no samples in some steps."""
    recipe = Recipe(samples=TEN, max_grad_norm=clipped, accumulation=2 if clipped else 1)
    for size, servers in CASES:
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
    """The same recipe where every rank trains and serves."""
    recipe = Recipe(samples=TEN, max_grad_norm=clipped, accumulation=2 if clipped else 1)
    for size in range(2, 9):
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
def test_a_refused_push_is_heard_of_in_push_pull(ranks: Ranks) -> None:
    """Two workers whose learning rates differ: the second is refused, and must not go on as if it had pushed."""
    group = ranks.group(0, 1, 2)
    if group is not None:
        store = ParameterServer(
            [("w", torch.zeros(5))], lambda tensors: torch.optim.SGD(tensors, lr=0.1 + group.rank), group=group
        )
        if store.role == "worker":
            assert store.optimizer is not None
            out, refused = torch.zeros(5), b""
            if store.group.rank == 0:
                store.push("w", torch.ones(5)).wait()
            store.group.barrier()
            if store.group.rank == 1:
                handle = store.push_pull("w", torch.ones(5), out)
                store.step()
                with pytest.raises(
                    UsageError, match=r"push of 'w' at clock 0 was refused by server 0: .*lr=0\.1 in group"
                ):
                    handle.wait()
                refused = b"refused"
            else:
                store.step()
                store.pull("w", out).wait()
            assert store.group.gather_bytes(refused, "who was refused") == [b"", b"refused"]
            store.close()


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
    monkeypatch.setattr(pulls, "UNIT_BYTES", 1)
    waits: list[str] = []
    wait = pulls.Pulls._wait

    def noted(self: pulls.Pulls, at: int) -> None:
        waits.extend(self.units[at].names)
        wait(self, at)

    monkeypatch.setattr(pulls.Pulls, "_wait", noted)
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
                assert not waits and len(engine._pulls.on_their_way(names)) == (len(names) if overlaps else 0)
                engine.zero_grad()
            # Whoever looks at all of it waits for all of it.
            digests.append([tensor.clone() for tensor in model.state_dict().values()])
            assert not engine._pulls.on_their_way(names)
            engine.close()
        if digests:
            assert all(torch.equal(a, b) for a, b in zip(*digests, strict=True))


@closing_stores
def test_a_value_that_is_read_too_early_is_an_error(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ``columns.weight`` when another module reads it behind its back."""
    monkeypatch.setattr(pulls, "UNIT_BYTES", 1)
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


def store(group: Group, consistency: str, servers: int = 1, **options: Any) -> ParameterServer:
    """Two keys; a push of ones takes 1 away from every number."""
    tensors = {"layer.weight": torch.arange(3000.0).view(30, 100), "layer.bias": torch.zeros(3)}
    options.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=1.0))
    return commlab.ParameterServer(tensors.items(), consistency=consistency, servers=servers, group=group, **options)


@closing_stores
def test_ssp_never_runs_further_ahead_and_asp_does(ranks: Ranks) -> None:
    """One worker is slow: what the others read is bounded by the consistency, and recorded."""
    found = {}
    for consistency in ("bsp", "ssp:0", "ssp:2", "asp"):
        made = store(ranks.world, consistency, servers=2)
        if made.role == "server":
            continue
        me, out, steps = made.group.rank, torch.empty(3), 8
        for _ in range(steps):
            made.pull("layer.bias", out).wait()
            if me == 0:
                # Under asp it does nothing at all until the others have made all their steps.
                time.sleep(0.02) if consistency != "asp" or made.clock else made.group.barrier()
            made.push("layer.bias", torch.ones(3)).wait()
            made.step()
        if me:
            made.leave()
            if consistency == "asp":
                made.group.barrier()
        made.group.barrier()
        made.pull("layer.bias", out).wait()
        updates = steps if consistency == "bsp" else steps * made.group.size
        assert (out == -updates).all() and made.version("layer.bias") == 1 + updates, (consistency, out)
        if me == 0:
            found[consistency] = max(made.report()["staleness"])
        made.group.barrier()
        made.close()
    if found:
        assert found["bsp"] == found["ssp:0"] == 0 and found["ssp:2"] <= 2 < found["asp"] == 7, found


@closing_stores
def test_push_pull_and_every_kind_of_tensor(ranks: Ranks) -> None:
    made = store(ranks.world, "bsp", servers=3, optimizer=None)
    if made.role == "worker":
        out = torch.empty(100, 30).t()
        assert made.push_pull("layer.weight", torch.ones(100, 30).t(), out).wait() is out
        assert torch.equal(out, torch.arange(3000.0).view(30, 100) + 1), "the mean of ones was added"
        with pytest.raises(UsageError, match=r"no key 'layer.wieght'; did you mean 'layer.weight', 'layer.bias'\?"):
            made.push("layer.wieght", out)
        with pytest.raises(UsageError, match=r"push of 'layer.bias' with a tensor of float32\[4\].* has float32\[3\]"):
            made.push("layer.bias", torch.ones(4))
        with pytest.raises(UsageError, match=r"pull of 'layer.bias' with a tensor of float64\[3\]"):
            made.pull("layer.bias", torch.ones(3, dtype=torch.float64))
        with pytest.raises(UsageError, match=r"push of 'layer.weight' .*twice in clock 0"):
            made.push("layer.weight", out).wait()
        made.step().wait()
        made.pull("layer.weight", out).wait()
        assert float(out.sum()) == sum(range(3000)) + 3000, "and the servers lost nothing"
        made.close()
        with pytest.raises(UsageError, match=r"step\(\) on a parameter server that was closed"):
            made.step()
    else:
        with pytest.raises(UsageError, match=r"push\(\) is for workers, and this rank was a server"):
            made.push("layer.bias", torch.ones(3))


@closing_stores
def test_arguments_that_can_not_be(ranks: Ranks) -> None:
    world = ranks.world
    for servers in (0, 8, 9):
        with pytest.raises(UsageError, match=rf"{servers} servers among 8 ranks"):
            store(world, "bsp", servers=servers)
    with pytest.raises(UsageError, match="optimizer Adafactor may need whole tensors"):
        store(world, "asp", optimizer=torch.optim.Adafactor)
    with pytest.raises(UsageError, match=r"max_grad_norm 1.0 needs all workers' gradients.*under asp.*or use bsp"):
        store(world, "asp", max_grad_norm=1.0)
    with pytest.raises(DisagreementError, match=r"here asp, .*; there ssp:1|here ssp:1, .*; there asp"):
        store(world, "asp" if world.rank == 5 else "ssp:1")
    with pytest.raises(DisagreementError, match=r"rank \d and rank \d make different"):
        commlab.ParameterServer([("a", torch.ones(2 + (world.rank == 3)))], group=world)
    made = store(world, "bsp")
    if made.role == "worker":
        made.close()


@closing_stores
def test_a_tied_tensor_is_one(ranks: Ranks) -> None:
    group = ranks.group(0, 1)
    if group is not None:
        shared = torch.ones(4)
        made = commlab.ParameterServer([("in", shared), ("out", shared)], group=group)
        assert made.placement.bytes_per_server == [16] and made.keys == ("in", "out")
        if made.role == "worker":
            out = torch.empty(4)
            assert (made.push_pull("in", torch.ones(4), out).wait() == 2).all()
            assert (made.pull("out", out).wait() == 2).all()
            made.close()


@closing_stores
def test_workers_that_return_without_a_word_are_waited_for_by_shutdown(ranks: Ranks) -> None:
    """``commlab.shutdown()`` closes what was left open."""
    group = ranks.world.subgroup(range(4))
    if group is not None:
        made = store(group, "asp")
        if made.role == "worker":
            made.push("layer.bias", torch.ones(3)).wait()
        group.close()
        if made.role == "worker":
            with pytest.raises(UsageError, match="was closed"):
                made.step()
