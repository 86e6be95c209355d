"""A small model with every kind of parameter that a strategy has to get right, its data, and its training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import Any

import torch

import commlab
from commlab.chunks import split
from commlab.job.topology import Topology
from commlab.runtime.group import Group
from commlab.strategies.engine import Engine
from commlab.strategies.reduced import ReducedGradient
from commlab.transport.sim import SimNetwork

WIDTH = 6
RAGGED = (10, 9, 1, 3, 10)
"""Samples per step, of all ranks together: an epoch that ends with ranks that have fewer and ranks that have none, then
the next one."""
EVEN = (24, 24, 24, 24, 24)
"""The same for 2, 3 and 4 ranks with one or two micro-batches: no count is needed."""


class Net(torch.nn.Module):
    """``first`` and ``last`` share their weight; ``turned`` is not contiguous; ``gain`` has one number, ``offset`` no
    dimension, ``empty`` no number. ``some`` sees only samples whose first number is above 1; ``spare`` sees none;
    ``fixed`` is frozen."""

    def __init__(self, all_used: bool = False):
        super().__init__()
        self.all_used = all_used
        self.first = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.turned = torch.nn.Parameter(torch.randn(7, WIDTH).div(WIDTH**0.5).t())
        self.middle = torch.nn.Linear(7, WIDTH)
        self.some = torch.nn.Linear(WIDTH, WIDTH)
        self.spare = torch.nn.Linear(5, 3) if not all_used else None
        self.empty = torch.nn.Parameter(torch.empty(0, 3))
        self.fixed = torch.nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.gain = torch.nn.Parameter(torch.tensor([1.0]))
        self.offset = torch.nn.Parameter(torch.tensor(0.1))
        self.last = torch.nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)) * self.fixed
        hidden = torch.tanh(self.middle(torch.tanh(hidden @ self.turned)))
        rare = (x[:, 0] > (-torch.inf if self.all_used else 1.0)).nonzero()[:, 0]
        if len(rare):
            hidden = hidden.index_add(0, rare, self.some(hidden[rare]))
        result: torch.Tensor = self.last(hidden) * self.gain + self.offset + self.empty.sum()
        return result


@dataclass(frozen=True)
class Recipe:
    """What is trained, apart from how ranks agree. All of it happens to ``single`` in the same way."""

    dtype: torch.dtype = torch.float32
    samples: Sequence[int] = RAGGED
    accumulation: int = 1
    counted: bool = True
    """Losses are sums, with a count; else means, of equal parts."""
    total_known: bool = True
    max_grad_norm: float | None = None
    all_used: bool = False
    optimizer: str = "SGD"


@dataclass
class Run:
    """What came out. ``digests``: of all parameters, after each step."""

    recipe: Recipe
    engine: Engine
    model: Net
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    digests: list[bytes] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def alone() -> Group:
    """A group of one rank, whatever launched this process."""
    return Group(SimNetwork(1).transports()[0], Topology(((0,),)))


def samples(step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a global batch, float32, distinct for every step and index."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(count, WIDTH, generator=generator), torch.randn(count, WIDTH, generator=generator)


def make_model(recipe: Recipe) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(recipe.all_used).to(recipe.dtype)


def make_optimizer(model: Net, recipe: Recipe) -> torch.optim.Optimizer:
    """Two groups that differ in every hyper-parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    others = [parameter for parameter in trained if parameter.dim() < 2]
    if recipe.optimizer == "SGD":
        return torch.optim.SGD(
            [
                {"params": matrices, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
                {"params": others, "lr": 0.05, "momentum": 0.5, "nesterov": True},
            ]
        )
    kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, recipe.optimizer)
    return kind([{"params": matrices, "lr": 2e-2, "weight_decay": 0.1}, {"params": others, "lr": 1e-2}])


def build(strategy: str, group: Group, recipe: Recipe, model: Net | None = None, **options: Any) -> Run:
    """Everything but the steps. ``options`` go to :func:`commlab.strategy`."""
    model = make_model(recipe) if model is None else model
    optimizer = make_optimizer(model, recipe)
    engine = commlab.strategy(strategy, model, optimizer, group, max_grad_norm=recipe.max_grad_norm, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return Run(recipe, engine, model, optimizer, scheduler)


def backward(engine: Engine, recipe: Recipe, step: int) -> None:
    """All micro-batches of this rank's part of one step's global batch."""
    inputs, targets = samples(step, recipe.samples[step])
    own = split(len(inputs), engine.group.size)[engine.group.rank]
    inputs, targets = inputs[own.start : own.stop].to(recipe.dtype), targets[own.start : own.stop].to(recipe.dtype)
    total = recipe.samples[step] if recipe.total_known else None
    parts = split(own.numel, recipe.accumulation)
    for index, part in enumerate(parts):
        with nullcontext() if index == len(parts) - 1 else engine.no_sync():
            if not part.numel:
                engine.backward(None, 0, total)
                continue
            errors = engine.model(inputs[part.start : part.stop]) - targets[part.start : part.stop]
            if recipe.counted:
                engine.backward(errors.square().sum(), part.numel, total)
            else:
                engine.backward(errors.square().sum() / part.numel / recipe.accumulation)


def go_on(run: Run, steps: Sequence[int]) -> Run:
    """Train the steps of these numbers."""
    for step in steps:
        backward(run.engine, run.recipe, step)
        run.engine.step()
        run.digests.append(digest(run.model))
        run.norms.append(run.engine.grad_norm)
        run.engine.zero_grad()
        run.scheduler.step()
    return run


def train(strategy: str, group: Group, recipe: Recipe, model: Net | None = None, **options: Any) -> Run:
    """All steps of the recipe; the engine is closed."""
    run = go_on(build(strategy, group, recipe, model, **options), range(len(recipe.samples)))
    run.engine.close()
    return run


@cache
def reference(recipe: Recipe) -> Run:
    """What ``single`` makes of it, in this process alone."""
    return train("single", alone(), recipe)


def clip_and_add_noise(pieces: Sequence[ReducedGradient], norms: dict[str, float]) -> None:
    """Edits of the reduced gradient that need the norms of whole tensors, each number, and a draw per tensor."""
    for piece in pieces:
        piece.tensor.mul_(1e-2 / (norms[piece.name] + 1e-6)).clamp_(-4e-3, 4e-3)
        piece.tensor.add_(piece.draw(lambda whole, generator: whole.normal_(0, 1e-3, generator=generator)))


def digest(model: torch.nn.Module) -> bytes:
    """Equal exactly when all parameters have the same bits."""
    found = blake2b(digest_size=16)
    for _, tensor in model.named_parameters():
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest norm of a difference over the norm, and the tensor that has it."""
    assert found.keys() == wanted.keys()
    worst = (0.0, "")
    for name, tensor in wanted.items():
        apart = float((found[name].double() - tensor.double()).norm())
        worst = max(worst, (apart / float(tensor.double().norm()) if apart else 0.0, name))
    return worst


def assert_same(found: Run, wanted: Run, tolerance: float = 3e-6) -> None:
    """Every tensor, and every gradient norm, within ``tolerance`` (norm of the difference over the norm); what nobody
    uses untouched."""
    worst, name = difference(tensors(found.model), tensors(wanted.model))
    assert worst <= tolerance, f"{name} differs by {worst:.2e} of its norm, more than {tolerance:.0e}"
    for step, (mine, theirs) in enumerate(zip(found.norms, wanted.norms, strict=True)):
        same = mine is theirs if mine is None or theirs is None else abs(mine - theirs) <= tolerance * theirs
        assert same, f"the gradient's norm in step {step} is {mine}, not {theirs}"
    if found.model.spare is not None:
        before = make_model(found.recipe).spare
        assert before is not None
        assert torch.equal(found.model.spare.weight, before.weight), "a parameter that nobody used was changed"
