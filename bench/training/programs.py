"""Random training programs: a model, an optimizer, a strategy, and what happens in each step. A seed and a number of
ranks name a program; all ranks draw the same one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MODELS = ("mlp", "tied", "rare", "conv", "lstm", "embedding", "norms")
"""Kinds of models (:mod:`.small_models`)."""
RARE = ("rare",)
"""Models with parameters that not every batch uses; ddp and horovod need them all."""
SMOOTH = ("SGD", "momentum", "nesterov")
"""Optimizers whose update is a linear function of the gradient: an error in a gradient makes one of its own size."""
ADAPTIVE = ("Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta", "ASGD")
"""Optimizers that divide by a gradient's size, and so magnify an error in one that is near 0; trained in float64. Rprop
is left out, which knows the sign alone: the sign of a gradient that is 0 but for rounding is chance."""
SCHEDULERS = (None, "StepLR", "ExponentialLR", "OneCycleLR", "LambdaLR")
EVENTS = ("raise", "lr", "write", "checkpoint", "freeze", "grow", "reopen", "edit", "evaluate")
"""What may happen before a step, apart from training.

    raise       forward raises an exception on all ranks in the midst of a step, which is dropped
    lr          the user sets another learning rate
    write       update_parameters() writes the parameters
    checkpoint  the run is saved; another model, optimizer and engine, of another strategy, restore it
    freeze      a layer is frozen, or what was frozen is trained again
    grow        a layer that was neither trained nor in the optimizer comes in through add_param_group()
    reopen      the engine is closed, and another strategy takes the same model and optimizer
    edit        the reduced gradient is clipped value by value, between backward and step
    evaluate    the model is evaluated on all ranks
"""


@dataclass(frozen=True)
class ProgramStep:
    """One step. All of it is known to all ranks."""

    events: tuple[str, ...]
    """Of EVENTS, in the order in which they happen."""
    samples: tuple[tuple[int, ...], ...]
    """Of each rank: the sizes of its micro-batches. No micro-batch is one of size 0."""
    counted: str
    """How losses are weighed: "mean" of means, "count" of samples, "weights" of samples, which are no whole numbers."""
    total_known: bool
    """Whether backward() is told the global count."""


@dataclass(frozen=True)
class TrainingProgram:
    """A training program."""

    seed: int
    ranks: int
    model: str
    dtype: str
    optimizer: str
    groups: int
    """Parameter groups of the optimizer."""
    scheduler: str | None
    max_grad_norm: float | None
    strategies: tuple[tuple[str, Mapping[str, Any]], ...]
    """The strategy and options that the program begins with, and after it one for each "checkpoint" and "reopen"."""
    steps: tuple[ProgramStep, ...]

    @property
    def wire(self) -> str | None:
        """The 16-bit wire that some strategy of the program has; None: numbers travel as they are."""
        return next((options["wire"] for _, options in self.strategies if options.get("wire")), None)

    def trainers(self, phase: int) -> int:
        """How many ranks train while the strategy of this index is in charge; the others serve."""
        servers: int = self.strategies[phase][1].get("servers", 0)
        return self.ranks - servers

    def record(self) -> dict[str, Any]:
        """The program as JSON has it."""
        return asdict(self)


def draw(seed: int, ranks: int) -> TrainingProgram:
    """The program of a seed and a number of ranks."""
    dice = random.Random(f"{seed} {ranks}")
    model = dice.choice(MODELS)
    optimizer = dice.choice(SMOOTH + ADAPTIVE)
    dtype = dice.choice(("float32", "float64")) if optimizer in SMOOTH else "float64"
    wire = dice.choice((None, None, "fp16", "bf16")) if dtype == "float32" else None
    steps: list[ProgramStep] = []
    left = set(EVENTS)
    for number in range(dice.randint(3, 7)):
        events = tuple(event for event in dice.sample(EVENTS, dice.choice((0, 0, 1, 1, 2))) if event in left and number)
        # Each costs a strategy of its own, or ends what can be done before it: once is enough.
        left -= {"checkpoint", "reopen", "grow"}.intersection(events)
        steps.append(_step(dice, ranks, events))
    changes = sum(event in ("checkpoint", "reopen") for step in steps for event in step.events)
    # A layer that comes in, or is frozen, needs an engine whose buckets can grow; edits, a gradient that is there; and
    # torch's schedulers do not know groups that were added after them.
    happening = {event for step in steps for event in step.events}
    strategies = tuple(_strategy(dice, ranks, model, wire, happening, steps) for _ in range(1 + changes))
    return TrainingProgram(
        seed,
        ranks,
        model,
        dtype,
        optimizer,
        dice.randint(1, 3),
        None if "grow" in happening else dice.choice(SCHEDULERS),
        dice.choice((None, 0.05, 1.0)),
        strategies,
        tuple(steps),
    )


def _step(dice: random.Random, ranks: int, events: tuple[str, ...]) -> ProgramStep:
    counted = dice.choice(("mean", "count", "count", "weights"))
    micro_batches = dice.choice((1, 1, 2, 3))
    if counted == "mean":
        size = dice.randint(1, 4)
        samples = tuple((size,) * micro_batches for _ in range(ranks))
    else:
        samples = tuple(tuple(dice.choice((0, 1, 2, 3, 5)) for _ in range(micro_batches)) for _ in range(ranks))
        # Where some ranks serve, at least the first two train: a count of 0 has no mean.
        if not sum(map(sum, samples[:2])):
            samples = ((1,) * micro_batches, *samples[1:])
    return ProgramStep(events, samples, counted, dice.random() < 0.5)


def _strategy(
    dice: random.Random,
    ranks: int,
    model: str,
    wire: str | None,
    happening: set[str],
    steps: Sequence[ProgramStep],
) -> tuple[str, dict[str, Any]]:
    names = ["allreduce", "dps", "ps"]
    if model not in RARE and all(min(map(min, step.samples)) for step in steps) and not happening & {"freeze", "grow"}:
        names.append("ddp")
    if ranks > 2 and not happening & {"freeze", "grow", "edit"}:
        names += ["ps servers", "dps servers"]
    name, _, servers = dice.choice(names).partition(" ")
    if name == "ddp":
        return name, {}
    options: dict[str, Any] = {"wire": wire, "bucket_bytes": dice.choice((None, 64, 500, 4096))}
    options["overlap"] = dice.random() < 0.7
    if servers:
        options["servers"] = 1 if name == "ps" else 2
        if name == "dps" and ranks == 3:
            return "ps", {**options, "servers": 1}
        options["overlap_pulls"] = dice.random() < 0.5
        return name, options
    options["algorithm"] = dice.choice(("auto", "auto", "ring", "halving", "direct", "tree"))
    return name, options
