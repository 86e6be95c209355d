"""Precision apex. Its adapter runs on a stand-in with Apex's interface (tests/fake_apex), on ranks that are threads;
that Apex itself does what its interface says is for a machine with a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from crew import Crew, by_turns, crew_of, groups
from training import alone, digest

import commlab
from commlab import apex
from commlab.errors import UsageError
from commlab.precision.masters import InPlaceMasters
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine

SIZE, STEPS, LR = 3, 6, 0.02
SHARED = ("allreduce", "ps", "dps")


def forget() -> None:
    for name in [name for name in sys.modules if name == "amp_C" or name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in for Apex's kernels."""
    forget()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tests/helpers/fake_apex"))
    monkeypatch.setattr(apex, "_sees_gpu", lambda: True)
    import amp_C

    yield amp_C
    forget()


crew = crew_of(SIZE)


def learner() -> torch.nn.Sequential:
    with by_turns, torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3))


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    """The same on all ranks: their mean gradient is that of one, exactly."""
    inputs = torch.randn(16, 7, generator=torch.Generator().manual_seed(step))
    result: torch.Tensor = (model(inputs.half()).float() - inputs[:, :3] * 2).square().mean()
    return result


def decayed(model: torch.nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [each for each in model.parameters() if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in model.parameters() if each.dim() < 2]},
    ]


def engine_of(strategy: str, group: Group, **options: Any) -> Engine:
    model = learner()
    optimizer = apex.fused_adam(decayed(model), lr=LR)
    engine = commlab.strategy(strategy, model, optimizer, group, precision="apex", bucket_bytes=400, **options)
    assert engine.precision.loss_scale is not None
    engine.precision.loss_scale.value = 2.0**10
    return engine


def train(engine: Engine, steps: range, bad: int | None = None) -> list[bytes]:
    digests = []
    for step in steps:
        loss = loss_of(engine.model, step)
        engine.backward(loss * torch.inf if step == bad and engine.group.rank == engine.group.size - 1 else loss)
        assert engine.step() is (step != bad)
        engine.zero_grad()
        digests.append(digest(engine.model))
    return digests


def by_hand(clip: float | None) -> list[bytes]:
    """fp16 parameters, fp32 masters, loss scale and clipping, in torch alone."""
    model, digests = learner().half(), []
    masters = [parameter.detach().clone() for parameter in learner().parameters()]
    matrices, rest = [each for each in masters if each.dim() > 1], [each for each in masters if each.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=LR, foreach=False
    )
    for step in range(STEPS):
        (loss_of(model, step) * 2.0**10).backward()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float() / 2.0**10
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(masters, clip)
        optimizer.step()
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.data.copy_(master)
            parameter.grad = None
        digests.append(digest(model))
    return digests


def test_one_rank_does_what_the_scheme_says(stand_in: ModuleType) -> None:
    engine = engine_of("single", alone())
    assert train(engine, range(STEPS)) == by_hand(None)
    assert all(parameter.dtype == torch.float16 for parameter in engine.model.parameters())
    assert stand_in.launches >= 2 * STEPS, "unscaled and written by Apex's kernel"


@pytest.mark.parametrize("strategy", SHARED)
def test_every_strategy_updates_masters(stand_in: ModuleType, crew: Crew, strategy: str) -> None:
    everyone = groups(SIZE)
    found = crew.all(lambda rank: train(engine_of(strategy, everyone[rank]), range(STEPS)))
    assert len(set(map(tuple, found))) == 1, "ranks have different parameters"
    assert found[0] == by_hand(None)


@pytest.mark.parametrize("strategy", ["single", *SHARED])
def test_clipped(stand_in: ModuleType, crew: Crew, strategy: str) -> None:
    """The norm is added up in another order than torch's, so not bit for bit: within the rounding to fp16."""
    ranks = 1 if strategy == "single" else SIZE
    everyone = [alone()] if ranks == 1 else groups(SIZE)

    def work(rank: int) -> list[torch.Tensor]:
        if rank >= ranks:
            return []
        engine = engine_of(strategy, everyone[rank], max_grad_norm=0.05)
        train(engine, range(STEPS))
        assert engine.grad_norm is not None and engine.grad_norm > 0.05
        return [parameter.detach().clone() for parameter in engine.model.parameters()]

    model = learner().half()
    found = crew.all(work)[0]
    assert by_hand(0.05) != by_hand(None)
    reference = engine_of("single", alone(), max_grad_norm=0.05)
    train(reference, range(STEPS))
    for mine, theirs, start in zip(found, reference.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine.float(), theirs.float(), rtol=2e-3, atol=1e-5)
        assert not torch.equal(mine, start)


@pytest.mark.parametrize("strategy", ["single", *SHARED])
def test_an_inf_on_one_rank_skips_the_step_on_all(stand_in: ModuleType, crew: Crew, strategy: str) -> None:
    everyone = [alone()] * SIZE if strategy == "single" else groups(SIZE)

    def work(rank: int) -> tuple[tuple[bytes, ...], float, int]:
        engine = engine_of(strategy, everyone[rank])
        digests = train(engine, range(STEPS), bad=2)
        return tuple(digests), engine.precision.scale, engine.skipped_steps

    found = set(crew.all(work))
    assert len(found) == 1
    digests, scale, skipped = found.pop()
    assert digests[2] == digests[1] and len(set(digests)) == STEPS - 1
    assert (scale, skipped) == (2.0**9, 1)


def test_masters_hold_what_fp16_cannot(stand_in: ModuleType) -> None:
    """Sixty updates of 1e-5 move a 1 in fp16, whose next number is 1e-3 away; without masters not one of them would."""
    model = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    engine = commlab.strategy("single", model, apex.fused_adam(model.parameters(), lr=1e-5), alone(), precision="apex")
    for step in range(60):
        engine.backward(model(torch.ones(1, 4, dtype=torch.float16)).float().sum())
        engine.step()
        engine.zero_grad()
        if step == 10:
            assert (model.weight == 1.0).all()
    assert (model.weight < 1.0).all()


@pytest.mark.parametrize("before, after", [("dps", "single"), ("single", "dps"), ("ps", "allreduce")])
def test_state_moves_between_strategies(stand_in: ModuleType, crew: Crew, before: str, after: str) -> None:
    """Half of the steps under one, the rest under another: the same bits as all of them under one."""

    def ranks(strategy: str) -> list[Group]:
        return [alone() for _ in range(SIZE)] if strategy == "single" else groups(SIZE)

    first, second = ranks(before), ranks(after)

    def begin(rank: int) -> tuple[Any, Any]:
        engine = engine_of(before, first[rank])
        train(engine, range(3))
        model = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
        return engine.state_dict(), model

    saved = crew.all(begin)

    def go_on(rank: int) -> list[bytes]:
        engine = engine_of(after, second[rank])
        engine.update_parameters(lambda model: model.load_state_dict(saved[0][1]))
        engine.load_state_dict(*(part for part, _ in saved))
        return train(engine, range(3, STEPS))

    assert crew.all(go_on) == [by_hand(None)[3:]] * SIZE


def test_parameters_that_the_user_writes_reach_the_masters(stand_in: ModuleType) -> None:
    engine = engine_of("single", alone())
    train(engine, range(2))
    bias = next(parameter for name, parameter in engine.model.named_parameters() if name == "0.bias")
    weight_masters = [piece.tensor.clone() for piece in engine.strategy.owned() if piece.parameter.name == "0.weight"]
    engine.update_parameters(lambda _: bias.fill_(0.5))
    pieces = {piece.parameter.name: piece.tensor for piece in engine.strategy.owned()}
    assert (pieces["0.bias"] == 0.5).all()
    assert torch.equal(pieces["0.weight"], weight_masters[0]), "what nobody wrote keeps all its bits"


def test_apex_amp_where_it_is_there(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"O2 is not to be had: this Apex has no amp.*leave the level out"):
        engine_of("single", alone(), apex_level="O2")
    calls = []

    def initialize(model: torch.nn.Module, **options: Any) -> None:
        calls.append(options["opt_level"])
        if options["opt_level"] == "O2":
            model.half()

    monkeypatch.setitem(sys.modules, "apex.amp", SimpleNamespace(initialize=initialize))  # type: ignore[misc]
    engine = engine_of("single", alone(), apex_level="O2")
    assert train(engine, range(STEPS)) == by_hand(None)
    engine = engine_of("single", alone(), apex_level="O1")
    assert all(parameter.dtype == torch.float32 for parameter in engine.model.parameters())
    assert isinstance(engine.strategy.training.masters, InPlaceMasters)
    engine.backward(engine.model(torch.ones(2, 7)).square().mean())
    before = digest(engine.model)
    assert engine.step() and digest(engine.model) != before
    assert calls == ["O2", "O1"]
    with pytest.raises(UsageError, match="unknown apex level 'O3'; there are none, O1, O2"):
        engine_of("single", alone(), apex_level="O3")


def test_dedicated_servers_do_without(stand_in: ModuleType) -> None:
    with pytest.raises(UsageError, match="works on the CPU, without Apex"):
        engine_of("ps", alone(), servers=1)
    model = torch.nn.Linear(3, 2, device="meta")
    with pytest.raises(UsageError, match="works on the CPU, without Apex"):
        commlab.strategy("ps", model, torch.optim.SGD(model.parameters(), lr=0.1), groups(2)[0], servers=1)


def test_other_optimizers_are_refused(stand_in: ModuleType) -> None:
    model = learner()
    with pytest.raises(UsageError, match=r"Apex's FusedAdam, not AdamW.*commlab\.apex\.fused_adam"):
        commlab.strategy("dps", model, torch.optim.AdamW(model.parameters()), alone(), precision="apex")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(UsageError) as refused:
            apex.Apex()
        return str(refused.value)

    forget()
    monkeypatch.setattr(apex, "_sees_gpu", lambda: False)
    monkeypatch.setitem(sys.modules, "apex", None)
    message = refusal()
    assert "sees no GPU; no module `apex`" in message
    assert "PyPI's `apex` is another package" in message and "Precision fp16 does the same" in message
    monkeypatch.setattr(apex, "_sees_gpu", lambda: True)
    assert "GPU;" not in refusal()

    # The other package of that name; and NVIDIA's without its extensions.
    monkeypatch.delitem(sys.modules, "apex")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "the module `apex` is not NVIDIA's" in refusal()
    forget()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tests/helpers/fake_apex"))
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert "built without its CUDA extensions, module `amp_C`" in refusal()
    monkeypatch.delitem(sys.modules, "amp_C")
    forget()


def test_the_strategy_says_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apex, "_sees_gpu", lambda: False)
    model = learner()
    for strategy in ("single", "dps"):
        with pytest.raises(UsageError, match="precision apex is not to be had"):
            commlab.strategy(strategy, model, torch.optim.AdamW(model.parameters()), alone(), precision="apex")
