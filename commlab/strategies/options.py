"""What the user may choose for any strategy, and the rules of what goes together: each rule stands here, once.

Two programs check their user's choice by these rules, each before anything is built: :func:`commlab.strategy`, whose
user has written ``servers=2``, and the trainer, whose user has written ``--servers 2``. An error spells options as the
user did (:class:`Spelling`). A strategy itself refuses what can't be known without torch: an optimizer that needs whole
tensors, a model on a GPU, a library that is missing.

Importing this loads neither torch nor numpy, so that a wrong flag is reported at once.
"""

from __future__ import annotations

import difflib
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from ..collectives.select import CHOICES
from ..errors import UsageError
from ..precision.loss_scale import LossScale
from ..ps.consistency import LOCKSTEP_ONLY, parse

KNOWN: Final[Mapping[str, tuple[str | None, ...]]] = {
    "strategy": ("single", "ps", "dps", "allreduce", "horovod", "ddp"),
    "algorithm": CHOICES,
    "precision": ("fp32", "bf16", "fp16", "apex"),
    "autocast": ("auto", "on", "off"),
    "apex_level": (None, "O1", "O2"),
    "wire": (None, "fp16", "bf16"),
    "nonfinite": ("torch", "error", "skip"),
    "buffers": ("broadcast", "mean", "local"),
    "shard": ("auto", "node", "job"),
}
"""The values of every option that is one of a few names."""

_OWN_BUCKETS = ("ps", "dps", "allreduce")
"""Strategies whose gradients travel in commlab's own buckets, by its own algorithms."""


@dataclass(frozen=True)
class Options:
    """The options of :func:`commlab.strategy`."""

    algorithm: str = "auto"
    """Which of the collectives' algorithms moves the buckets of ps, dps and allreduce."""
    precision: str = "fp32"
    """What the model is computed in: fp32, bf16, fp16, apex."""
    autocast: str = "auto"
    """16-bit matrix products, for precision bf16 and fp16: auto (where they are fast), on, off."""
    loss_scale: LossScale | None = None
    """Where the loss scale of precision fp16 and apex starts, and how it grows and falls; None: as LossScale() does."""
    apex_level: str | None = None
    """For precision apex: O1 or O2 of apex.amp, where Apex still has it; None: without apex.amp, as O2."""
    wire: str | None = None
    """The 16-bit format in which numbers travel, fp16 or bf16; None: they travel as they are."""
    max_grad_norm: float | None = None
    """Clip the reduced gradient to this global 2-norm; None: the norm is not computed."""
    nonfinite: str = "torch"
    """What a step does whose gradient, norm or loss is inf or NaN on any rank, where there is no loss scale (with one
    such a step is always skipped). torch: what torch.nn.utils.clip_grad_norm_ makes of it: a NaN norm makes every
    gradient NaN, an infinite one makes it 0 where it was finite; error: NotFiniteError on every rank, which names rank
    and parameter; skip: no update on any rank."""
    buffers: str = "broadcast"
    """What becomes of buffers that forward writes (batch norm's statistics). broadcast: after each step every rank has
    rank 0's; mean: floating-point ones are averaged; local: every rank keeps its own. Under ssp and asp: in settle()
    only."""
    check_replicas: int = 100
    """Every so many steps ranks compare a digest of what each has a copy of (parameters, buffers, and the optimizer's
    state where it is not sharded); 0: only in settle(), and when a rank has written parameters between the steps."""
    bucket_bytes: int | None = None
    """The most that is sent together; None: :func:`commlab.gradients.bucket.usual_bytes`; ddp: torch's own."""
    overlap: bool = True
    """Buckets leave while backward goes on; False: the same buckets, once it has ended. For ps, dps and allreduce."""
    elementwise: bool | None = None
    """True: an optimizer of the user's own updates every number from that number's own gradient and state alone; None:
    only torch's optimizers are known to do so."""
    partial: bool = False
    """True: the optimizer has a part of the model's trainable parameters, and other engines, with other optimizers,
    train the rest; False: a trainable parameter that the optimizer does not have is an error."""
    shard: str = "auto"
    """What pushes and pulls as one, on several nodes, under ps and dps. node: the ranks of each node, which add their
    gradients up in its memory and have one copy of the parameters there. dps cuts that and the optimizer's state among
    the ranks of each node, and only gradients travel between nodes, during backward; ps sends a node's sum to rank 0
    once, and the new parameters to each node once. job: all ranks, each with parameters of its own, among which dps
    cuts the state. auto: node where each node shares memory, and all have equally many ranks. On one node the two are
    the same."""
    servers: int | None = None
    """Ranks that only serve, for ps (1) and dps (2 and more); None: every rank trains, and serves."""
    consistency: str = "bsp"
    """When a worker may read, where some ranks only serve: bsp, ssp:S, asp."""
    overlap_pulls: bool = False
    """Where some ranks only serve: step() does not wait for the new parameters; the next forward does, for each where
    it first reads it. Until then only forward, ``state_dict()`` and ``engine.settle()`` may look at parameters."""

    def check(self, strategy: str, size: int | None = None, spelling: Spelling | None = None) -> None:
        """UsageError for the first rule that these options break under a strategy. Ranks that were given the same
        options raise the same error.

        ``size``: how many ranks there are; None: not known yet, and rules that need the number are left out.
        ``spelling``: how the user has written options; None: as keywords.
        """
        for option, names in KNOWN.items():
            require_known(option, strategy if option == "strategy" else getattr(self, option), names)
        parse(self.consistency)
        choice = Choice(strategy, self, size)
        for rule in RULES:
            if rule.broken(choice):
                raise UsageError(rule.message(choice, spelling or Keywords()))


def require_known(option: str, value: object, names: Iterable[str | None]) -> None:
    """UsageError, with all names and the nearest one, where ``value`` is none of ``names``."""
    names = tuple(names)
    if value not in names:
        known = [name or "none" for name in names]
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown {option.replace('_', ' ')} {value!r}; there are {', '.join(known)}{hint}")


class Spelling(Protocol):
    """How a user writes options."""

    def name(self, option: str) -> str:
        """The option alone."""

    def setting(self, option: str, value: object) -> str:
        """The option with a value."""


class Keywords:
    """The spelling of :func:`commlab.strategy`."""

    def name(self, option: str) -> str:
        return option

    def setting(self, option: str, value: object) -> str:
        return f"strategy {value}" if option == "strategy" else f"{option}={value!r}"


class Choice(NamedTuple):
    """All that a rule may look at."""

    strategy: str
    options: Options
    size: int | None
    """How many ranks there are, where that is known."""

    @property
    def lockstep(self) -> bool:
        """Whether all workers make each step together."""
        return parse(self.options.consistency).averages


class Rule(NamedTuple):
    """A combination that can't be had: ``broken`` finds it in a choice.

    The texts are templates: ``{servers}`` stands for the option with the value that was chosen, ``{servers:1}`` for the
    option with another value, ``{servers.name}`` and ``{servers.value}`` for one of the two, and ``{ranks}`` for the
    number of ranks.
    """

    options: tuple[str, ...]
    """What the combination is made of; each is named in the message."""
    broken: Callable[[Choice], bool]
    why: str
    """What was chosen, and the reason against it."""
    instead: str
    """What to do."""

    def message(self, choice: Choice, spelling: Spelling) -> str:
        values = {"strategy": choice.strategy, **vars(choice.options)}
        words: dict[str, object] = {name: _Setting(spelling, name, value) for name, value in values.items()}
        words["ranks"] = f"{choice.size} rank{'s' * (choice.size != 1)}"
        return f"{self.why}; {self.instead}".format_map(words)


@dataclass(frozen=True)
class _Setting:
    """An option with a value, inside a template."""

    spelling: Spelling
    option: str
    value: object

    @property
    def name(self) -> str:
        return self.spelling.name(self.option)

    def __format__(self, other: str) -> str:
        return self.spelling.setting(self.option, literal_eval(other) if other else self.value)


RULES: Final[tuple[Rule, ...]] = (
    Rule(
        ("max_grad_norm",),
        lambda choice: choice.options.max_grad_norm is not None and not choice.options.max_grad_norm > 0,
        "{max_grad_norm.name} must be positive, not {max_grad_norm.value}",
        "{max_grad_norm:None} turns clipping off",
    ),
    Rule(
        ("overlap", "strategy"),
        lambda choice: not choice.options.overlap and choice.strategy not in _OWN_BUCKETS,
        "{overlap}: {strategy} sends no buckets of commlab's, so overlap can't be turned off",
        "leave it on, or take one of ps, dps, allreduce",
    ),
    Rule(
        ("algorithm", "strategy"),
        lambda choice: choice.options.algorithm != "auto" and choice.strategy not in _OWN_BUCKETS,
        "{algorithm} has no meaning for {strategy}",
        "leave it out, or take one of ps, dps, allreduce",
    ),
    Rule(
        ("algorithm", "strategy"),
        lambda choice: (
            choice.options.algorithm == "hierarchical"
            and choice.strategy in ("ps", "dps")
            and choice.options.servers is None
        ),
        "{algorithm}: hierarchical is for allreduce, and {strategy} pushes and pulls",
        "give {algorithm:'auto'}, or take {strategy:'allreduce'}",
    ),
    Rule(
        ("shard", "strategy"),
        lambda choice: choice.options.shard != "auto" and choice.strategy not in ("ps", "dps"),
        "{shard} with {strategy}: only ps and dps push to owners, for whom a node can be one",
        "leave it out, or take {strategy:'ps'} or {strategy:'dps'}",
    ),
    Rule(
        ("shard", "servers"),
        lambda choice: choice.options.shard != "auto" and choice.options.servers is not None,
        "{shard} with {servers}: ranks that only serve hold the shards then",
        "leave one of the two out",
    ),
    Rule(
        ("wire", "strategy"),
        lambda choice: choice.options.wire is not None and choice.strategy == "single",
        "{wire} has no meaning for {strategy}, which sends nothing",
        "leave it out",
    ),
    Rule(
        ("wire", "strategy"),
        lambda choice: choice.options.wire is not None and choice.strategy == "ddp",
        "{wire}: {strategy} sends gradients as they are",
        "give {wire:None}, or take one of ps, dps, allreduce",
    ),
    Rule(
        ("wire", "strategy"),
        lambda choice: choice.options.wire == "bf16" and choice.strategy == "horovod",
        "{wire} with {strategy}: Horovod has no bf16 compression",
        "give {wire:'fp16'} or {wire:None}, or take {strategy:'allreduce'}",
    ),
    Rule(
        ("autocast", "precision"),
        lambda choice: choice.options.autocast == "on" and choice.options.precision not in ("bf16", "fp16"),
        "{autocast} has no meaning for {precision}, in which nothing is cast",
        "leave it out, or give {precision:'bf16'} or {precision:'fp16'}",
    ),
    Rule(
        ("apex_level", "precision"),
        lambda choice: choice.options.apex_level is not None and choice.options.precision != "apex",
        "{apex_level} has no meaning for {precision}",
        "leave it out, or give {precision:'apex'}",
    ),
    Rule(
        ("consistency", "servers"),
        lambda choice: choice.options.consistency != "bsp" and choice.options.servers is None,
        "{consistency} needs ranks that only serve",
        "give {servers:1} with {strategy:'ps'}, or {servers:2} or more with {strategy:'dps'}",
    ),
    Rule(
        ("servers", "strategy"),
        lambda choice: (
            choice.options.servers is not None
            and not (choice.strategy == "ps" and choice.options.servers == 1)
            and not (choice.strategy == "dps" and choice.options.servers >= 2)
        ),
        "{servers} with {strategy}: ps has 1 server, dps 2 or more, and the others have none",
        "give {servers:1} with {strategy:'ps'}, or {servers:2} or more with {strategy:'dps'}, or leave it out",
    ),
    Rule(
        ("algorithm", "servers"),
        lambda choice: choice.options.algorithm != "auto" and choice.options.servers is not None,
        "{algorithm} is for collectives, and with {servers} workers send messages",
        "leave it out",
    ),
    Rule(
        ("precision", "servers"),
        lambda choice: choice.options.precision == "apex" and choice.options.servers is not None,
        "{precision} with {servers}: who only serves works on the CPU, without Apex",
        "leave {servers.name} out, or give {precision:'fp16'}",
    ),
    Rule(
        ("max_grad_norm", "consistency"),
        lambda choice: choice.options.max_grad_norm is not None and not choice.lockstep,
        f"{{max_grad_norm}} {LOCKSTEP_ONLY}, so there is no global norm",
        "give {max_grad_norm:None} or {consistency:'bsp'}",
    ),
    Rule(
        ("precision", "consistency"),
        lambda choice: choice.options.precision == "fp16" and not choice.lockstep,
        "{precision} can't be had under {consistency}: workers can't agree to skip a step that overflows",
        "give {precision:'bf16'} or {consistency:'bsp'}",
    ),
    Rule(
        ("nonfinite", "consistency"),
        lambda choice: choice.options.nonfinite == "skip" and not choice.lockstep,
        "{nonfinite} can't be had under {consistency}: workers can't agree to skip a step",
        "give {nonfinite:'error'} or {consistency:'bsp'}",
    ),
    Rule(
        ("check_replicas",),
        lambda choice: choice.options.check_replicas < 0,
        "{check_replicas.name} must be 0 or more steps, not {check_replicas.value}",
        "{check_replicas:0} compares replicas in settle() alone",
    ),
    Rule(
        ("strategy",),
        lambda choice: choice.strategy == "single" and choice.size is not None and choice.size > 1,
        "{strategy} trains on one rank, and this job has {ranks}",
        "start one process without mpirun, or take another strategy",
    ),
    Rule(
        ("servers",),
        lambda choice: (
            choice.options.servers is not None and choice.size is not None and choice.options.servers >= choice.size
        ),
        "{servers} of {ranks} leave none to train",
        "start more ranks, or give fewer servers",
    ),
)
"""All rules, in the order in which they are checked."""
