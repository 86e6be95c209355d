"""What users do to a training loop, a kind at a time: done by every strategy beside plain torch, with one of two
outcomes: the right numbers, or an error on every rank. ``python tests/helpers/kinds.py`` writes the table of
docs/porting.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from coupled import Everybody
from crew import Crew, groups

import commlab
from commlab.errors import CommlabError
from commlab.strategies.engine import Engine
from commlab.strategies.options import Options

PAGE = Path(__file__).resolve().parents[2] / "docs" / "porting.md"
RANKS = 2
STEPS = 3
STRATEGIES = ("allreduce", "ps", "dps", "ddp, horovod")
"""Columns of the table. In the last one stands a library whose exchange commlab knows nothing of."""
HEAD = "| what the loop does | allreduce | ps | dps | ddp, horovod |\n|---|---|---|---|---|\n"


@dataclass
class Trial:
    """A training of one rank, or in plain torch the one of all."""

    model: torch.nn.Sequential
    optimizer: torch.optim.Optimizer
    rank: int | None
    """None in plain torch."""
    engine: Engine | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())


Act = Callable[[Trial], object]


def _nothing(_: Trial) -> None:
    pass


@dataclass(frozen=True)
class Kind:
    """One thing that users do. ``options`` go to ``commlab.strategy``."""

    row: str
    text: str
    before: Act = _nothing
    """Before the engine is built."""
    between: Act = _nothing
    """Before the second step."""
    edit: Act = _nothing
    """Between backward and step, in the second step."""
    after: Act = _nothing
    """After the last step."""
    count: float | None = None
    """What the second step's backward() is told that the losses count."""
    is_refused: bool = False
    """Whether plain torch has no answer, so that it must be refused."""
    nonfinite: str = "torch"


def _alone(act: Act, rank: int = 1) -> Act:
    return lambda trial: act(trial) if trial.rank in (None, rank) else None


def _only(act: Act, rank: int) -> Act:
    return lambda trial: act(trial) if trial.rank == rank else None


def _freeze(trial: Trial) -> None:
    trial.parameters[0].requires_grad_(False)


def _unfreeze(trial: Trial) -> None:
    trial.parameters[0].requires_grad_(True)
    trial.optimizer.add_param_group({"params": [trial.parameters[0]], "lr": 0.05})


def _without_first(trial: Trial) -> None:
    _freeze(trial)
    group = trial.optimizer.param_groups[0]
    group["params"] = [each for each in group["params"] if each.requires_grad]


def _add(trial: Trial) -> None:
    for parameter in trial.parameters:
        assert parameter.grad is not None
        parameter.grad.add_(0.01)


def _clip_norm(trial: Trial) -> None:
    torch.nn.utils.clip_grad_norm_(trial.parameters, 0.05)


def _set_lr(trial: Trial) -> None:
    trial.optimizer.param_groups[0]["lr"] = 0.7


def _move(trial: Trial) -> None:
    trial.parameters[0].data = trial.parameters[0].data.clone()


def _drop(trial: Trial) -> None:
    trial.parameters[1].grad = None


def _clip_pieces(trial: Trial) -> None:
    pieces = [each.grad for each in trial.parameters] if trial.engine is None else trial.engine.reduced_gradients()
    for piece in pieces:
        getattr(piece, "tensor", piece).clamp_(-0.01, 0.01)


def _write(trial: Trial) -> None:
    with torch.no_grad():
        trial.parameters[2].mul_(0.5)


def _update(trial: Trial) -> None:
    def change(model: torch.nn.Module) -> None:
        for at, parameter in enumerate(model.parameters()):
            drawn = torch.rand(parameter.shape, dtype=parameter.dtype) if trial.rank else None
            parameter.copy_(torch.full_like(parameter, 0.1 * (at + 1)) if drawn is None else drawn)

    if trial.engine is not None:
        trial.engine.update_parameters(change)
    else:
        with torch.no_grad():
            change(trial.model)


def _load(trial: Trial) -> None:
    with torch.no_grad():
        for parameter in trial.parameters:
            parameter.add_(0.25)
    for parameter in trial.parameters:
        trial.optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 0.125)
    trial.optimizer.param_groups[0]["lr"] = 0.03


def _go_on(trial: Trial) -> None:
    if trial.engine is not None:
        trial.engine.close()
        trial.engine = None
    loss_of(trial.model, 7, 0).backward()
    trial.optimizer.step()


def _second(trial: Trial) -> None:
    if trial.engine is not None:
        commlab.strategy("single", trial.model, trial.optimizer, groups(1)[0])


def _share(trial: Trial) -> None:
    trial.model[2].weight.data = trial.model[0].weight.data.view(-1)[:8].view(2, 4)


def _skip(trial: Trial) -> None:
    assert trial.engine is not None
    loss_of(trial.model, 5, 0)
    trial.engine.zero_grad()


def _spoil(trial: Trial) -> None:
    """The gradient becomes NaN: on rank 1 alone, in its own samples."""
    trial.model.register_forward_pre_hook(_not_a_number)


def _not_a_number(module: torch.nn.Module, inputs: Any) -> Any:
    module._forward_pre_hooks.clear()
    return (inputs[0] * float("nan"),)


KINDS: Sequence[Kind] = (
    Kind("A1", "`clip_grad_norm_` between backward and step", edit=_clip_norm),
    Kind("A1", "`p.grad.add_()` there", edit=_add),
    Kind("A1", "`p.grad = None` there", edit=_drop),
    Kind("A1", "`engine.reduced_gradients()`, clipped by value", edit=_clip_pieces),
    Kind("A2", "freezes a layer", between=_freeze),
    Kind("A2", "unfreezes one, `optimizer.add_param_group()`", before=_without_first, between=_unfreeze),
    Kind("A2", "freezes a layer on one rank alone", between=_only(_freeze, 1), is_refused=True),
    Kind("A3", "another learning rate on one rank", between=_only(_set_lr, 1), is_refused=True),
    Kind("A4", "rank 0 alone loads model and optimizer, before", before=_alone(_load, 0)),
    Kind("A4", "one rank alone writes parameters, after", between=_only(_write, 1), is_refused=True),
    Kind("A5", "`optimizer.state_dict()` of the coupled optimizer", between=lambda t: t.optimizer.state_dict()),
    Kind("A7", "`b.data = a.data`", before=_share),
    Kind("A8", "`p.data = p.data.clone()`", between=_move),
    Kind("A9", "`p.mul_()` on every rank", between=_write),
    Kind("A10", "`engine.update_parameters()` with random numbers", between=_update),
    Kind("A11", "`count=0.7`", count=0.7),
    Kind("A12", "`engine.model.eval()`", between=lambda t: (t.model if t.engine is None else t.engine.model).eval()),
    Kind("A13", "`engine.close()`, and on in plain torch", after=_go_on),
    Kind("A13", "a second engine on the same model", between=_second, is_refused=True),
    Kind("A14", "NaN on one rank, `nonfinite=\"error\"`", between=_only(_spoil, 1), nonfinite="error", is_refused=True),
    Kind("A19", "one rank drops a step and goes on", between=_only(_skip, 1), is_refused=True),
    Kind("B7", "`optimizer.step()` in place of the engine's", edit=lambda t: t.optimizer.step(), is_refused=True),
)  # fmt: skip


def make() -> Trial:
    """Model and optimizer in fp64, of closed-form values."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).add(at).sin().view(parameter.shape))
    return Trial(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)


def loss_of(model: torch.nn.Module, step: int, rank: int) -> torch.Tensor:
    inputs = (torch.arange(6, dtype=torch.float64) * (1.3 + step) + rank).cos().view(2, 3)
    loss: torch.Tensor = model(inputs).square().mean()
    return loss


def plain(kind: Kind) -> list[torch.Tensor]:
    """The parameters that plain torch ends with."""
    trial = make()
    kind.before(trial)
    for step in range(STEPS):
        if step == 1:
            kind.between(trial)
        trial.optimizer.zero_grad()
        total = RANKS if step != 1 or kind.count is None else kind.count * RANKS
        for rank in range(RANKS):
            (loss_of(trial.model, step, rank) / total).backward()
        if step == 1:
            kind.edit(trial)
        trial.optimizer.step()
    trial.optimizer.zero_grad()
    kind.after(trial)
    return [each.detach().clone() for each in trial.parameters]


def coupled(kind: Kind, strategy: str, rank: int, group: commlab.Group) -> list[torch.Tensor]:
    """The same on one rank under a strategy."""
    trial = make()
    trial.rank = rank
    kind.before(trial)
    options = {"nonfinite": kind.nonfinite}
    engine = (
        Engine(Everybody(trial.model, trial.optimizer, group, Options(**options)))
        if "," in strategy
        else commlab.strategy(strategy, trial.model, trial.optimizer, group, **options)
    )
    trial.engine = engine
    for step in range(STEPS):
        if step == 1:
            kind.between(trial)
        engine.backward(loss_of(trial.model, step, rank), kind.count if step == 1 else None)
        if step == 1:
            kind.edit(trial)
        engine.step()
        engine.zero_grad()
    engine.settle()
    kind.after(trial)
    return [each.detach().clone() for each in trial.parameters]


def outcome(kind: Kind, strategy: str) -> str:
    """ "right" or "refused"; AssertionError for anything else."""
    of_rank = groups(RANKS)
    crew = Crew(RANKS)

    def run(rank: int) -> Any:
        try:
            return coupled(kind, strategy, rank, of_rank[rank])
        except (CommlabError, RuntimeError) as error:
            return error

    try:
        found = crew.all(run)
    finally:
        crew.close()
    raised = [isinstance(each, Exception) for each in found]
    assert all(raised) or not any(raised), f"{kind.text} under {strategy}: refused on some ranks only: {found}"
    if all(raised):
        return "refused"
    assert not kind.is_refused, f"{kind.text} under {strategy}: no rank was told anything"
    for mine in found:
        for at, (tensor, wanted) in enumerate(zip(mine, plain(kind), strict=True)):
            torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-14, msg=f"{kind.text}, {strategy}: {at}")
    return "right"


def table() -> str:
    """The rows of the page."""
    rows = []
    for kind in KINDS:
        cells = " | ".join(outcome(kind, strategy) for strategy in STRATEGIES)
        rows.append(f"| {kind.text} | {cells} |\n")
    return HEAD + "".join(rows)


def table_on_the_page() -> str:
    text = PAGE.read_text()
    found = re.search(re.escape(HEAD) + r"(\|.*\n)*", text)
    assert found, f"{PAGE} has no table of kinds"
    return found[0]


if __name__ == "__main__":
    shown = table()
    if PAGE.exists():
        PAGE.write_text(PAGE.read_text().replace(table_on_the_page(), shown))
    sys.stdout.write(shown)
