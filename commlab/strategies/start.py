"""The start of every strategy: parameters are named, all ranks get what rank 0 has, the precision and the masters are
made, and buckets are planned, in memory that the ranks share where there is a window."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..checkpoint.whole import give_back
from ..collectives.operations import empty
from ..errors import UsageError
from ..gradients.bucket import Bucket, plan, usual_bytes
from ..gradients.hooks import GradientBuckets, Waitable
from ..gradients.mirror import pin
from ..gradients.parameters import (
    Named,
    NamedParameter,
    members_of,
    name_parameters,
    require_memory_of_their_own,
    require_numbers,
)
from ..native.dtypes import WIRES
from ..precision.masters import Masters
from ..precision.modes import Precision
from ..runtime.control import raise_together
from ..runtime.group import Group
from ..window.memory import Window
from .buffers import Buffers
from .changes import Planned, Roster
from .claims import require_free_model, require_free_optimizer
from .copies import copy_from_rank_0, start_from_rank_0
from .counts import StepCounts
from .holders import Levels, require_node_memory
from .options import Options
from .structure import Structure
from .verdict import StepRecord


@dataclass(eq=False)
class Training:
    """What an engine and its strategy both work on."""

    model: torch.nn.Module
    """The user's own model."""
    optimizer: torch.optim.Optimizer
    """The user's own optimizer; what it updates are the pieces of ``masters``."""
    group: Group
    """The ranks that train."""
    options: Options
    parameters: Sequence[NamedParameter]
    """What is trained, in registration order."""
    frozen: Sequence[NamedParameter]
    """What the optimizer has besides, and passes over."""
    members: Sequence[Sequence[torch.Tensor]]
    """The whole parameters of each of the optimizer's groups, which hold pieces or masters of them meanwhile."""
    precision: Precision
    masters: Masters
    """What the optimizer updates for the parameters."""
    counts: StepCounts
    """The token counts of the step that is under way."""
    structure: Structure
    """Sees when something else is to be trained."""
    record: StepRecord
    """What this rank says of the step that is under way, for the ranks to compare."""
    buffers: Buffers
    """The model's buffers, which are made alike after each step."""
    holders: Group
    """The ranks that hold the optimizer's state once among them, where it is sharded: all, or those of this rank's node
    (:mod:`.holders`)."""
    window: Window | None
    """The memory that ranks share, in which buckets lie; None where each rank has its buckets for itself."""
    wants_norm: bool
    """Whether the verdict needs the squares: for clipping, and with a loss scale to see what overflowed only when the
    ranks' numbers were added up, where no rank packed an inf."""
    across: Group | None = None
    """The ranks that hold what this rank does, one on each node; None where each number of the state exists once."""
    levels: Levels | None = None
    """The groups by which gradients travel where the node is the unit; else None."""
    shard_reason: str = ""
    """Among whom the state is sharded, and why so, in words; empty where there is nothing to choose."""
    steps: int = 0
    """Steps that the engine has made, those included that the checkpoint that was loaded had made."""
    forward_wait_s: float = 0.0
    """Seconds in which forward has waited for parameters, since the engine last took them into its times."""
    agreed: Named = field(init=False)
    """What all ranks have last agreed to train. Dedicated servers keep what is frozen among ``parameters``."""

    def __post_init__(self) -> None:
        self.agreed = Named(list(self.parameters), list(self.frozen))

    @property
    def in_window(self) -> bool:
        """Whether buckets lie in memory that ranks share."""
        return self.window is not None

    @property
    def sharers(self) -> Group:
        """The ranks that share memory, where any do: all, or those of this rank's node."""
        return self.group if self.levels is None else self.levels.node

    def poll(self) -> None:
        """Let everything that this training has under way move on, without waiting."""
        self.group.progress.poll()
        if self.levels is not None:
            self.levels.node.progress.poll()
            self.levels.across.progress.poll()

    @property
    def planned(self) -> Planned:
        """What is trained now, for who looks for changes."""
        return Planned(self.agreed, self.members, self.masters.pieces, self.options.partial)

    def give_back(self, members: Sequence[Sequence[torch.Tensor]], *, sharded: bool) -> None:
        """Let the optimizer's groups have whole parameters, ``members``, with all that it remembers of what was trained
        so far. ``sharded``: ranks have updated pieces of it, and the call is collective; else each all of it."""
        give_back(self.holders, self.optimizer, self.masters.pieces, self.parameters, members, sharded=sharded)

    def replan(self, roster: Roster) -> None:
        """Train what ``roster`` says; the optimizer has whole parameters. Newly trained ones get rank 0's values.
        Collective."""
        known = {id(item.tensor) for item in self.parameters}
        self.parameters, self.frozen = self.agreed = roster.named
        self.members = roster.members
        if self.group.size > 1:
            new = [(item.name, item.tensor.detach()) for item in self.parameters if id(item.tensor) not in known]
            copy_from_rank_0(self.group, new)
        self.masters.replan(self.parameters)


def start(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group,
    options: Options,
    *,
    named: Named | None = None,
    members: Sequence[Sequence[torch.Tensor]] | None = None,
    moves: str = "",
    synchronize: Callable[[], None] | None = None,
) -> Training:
    """Begin to train ``model`` on the ranks of ``group``. Collective. ``named``, ``members``: the parameters, and those
    of each group, where the optimizer does not have them any more. ``moves``: see :func:`require_trainable`.
    ``synchronize()`` makes all ranks start from all that rank 0 has; None: :func:`.copies.start_from_rank_0` does.
    UsageError on every rank, before anything is changed, where the parameters are not such as can be trained."""
    _require_plain_step(optimizer)
    if named is None:
        named = raise_together(group, lambda: require_trainable(model, optimizer, options, moves, group))
    parameters = named.trained
    members = members_of(optimizer) if members is None else members
    device = next(iter(model.parameters())).device
    if synchronize is not None:
        synchronize()
    else:
        start_from_rank_0(group, model, optimizer, options)
    precision = Precision(options.precision, options.autocast, device, group, options.loss_scale)
    masters = precision.masters(model, parameters, optimizer, options.apex_level)
    counts, structure = StepCounts(group), Structure(model, optimizer)
    buffers = Buffers(model, options.buffers, group)
    looks_at_losses = options.nonfinite != "torch" and precision.loss_scale is None
    record = StepRecord(
        group,
        model,
        optimizer,
        precision.loss_scale,
        counts,
        structure,
        buffers,
        looks_at_losses=looks_at_losses,
    )
    return Training(
        model,
        optimizer,
        group,
        options,
        parameters,
        named.frozen,
        members,
        precision,
        masters,
        counts,
        structure,
        record,
        buffers,
        group,
        group.window if options.algorithm in ("auto", "window") else None,
        wants_norm=options.max_grad_norm is not None
        or precision.loss_scale is not None
        or options.nonfinite != "torch",
    )


def _require_plain_step(optimizer: torch.optim.Optimizer) -> None:
    """UsageError for an optimizer whose step wants to compute the loss again."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"optimizer {type(optimizer).__name__} wants a closure, by which its step() computes loss and gradient "
            "again and again; an engine gives it one reduced gradient a step. Take an optimizer without a closure"
        )


def require_trainable(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    options: Options,
    moves: str = "",
    group: Group | None = None,
) -> Named:
    """The parameters of ``optimizer`` in ``model``, all of which an engine may train. UsageError for the first that it
    can't. ``moves``: the strategy, where the strategy gives parameters other memory; ``group``: the ranks, where these
    may have to share it."""
    if group is not None:
        require_node_memory(group, options)
    require_free_optimizer(optimizer)
    require_numbers(model)
    named = name_parameters(model, members_of(optimizer), partial=options.partial)
    require_free_model(model, [*named.trained, *named.frozen])
    if moves:
        require_memory_of_their_own(f"strategy {moves}", model, named.trained)
    return named


def start_buckets(training: Training, launch: Callable[[Bucket], Waitable], *, keep_gradients: bool) -> GradientBuckets:
    """Plan buckets for collectives, which ``launch(bucket)`` starts, and watch backward for them. Collective."""
    group, options = training.group, training.options
    if options.algorithm == "window" and not training.in_window:
        raise UsageError(f"algorithm window is not to be had: {group.window_reason}; use auto")

    def allocate(numel: int, dtype: torch.dtype) -> torch.Tensor:
        if training.window is None:
            return torch.empty(numel, dtype=dtype, device="cpu")
        return empty(numel, dtype, training.sharers)

    bucket_bytes = options.bucket_bytes or usual_bytes(training.parameters, len(group.nodes), group.byte_s)
    buckets = plan(training.parameters, bucket_bytes, WIRES[options.wire], allocate)
    if any(bucket.mirror is not None for bucket in buckets):
        pin_flats(training, [bucket.flat for bucket in buckets])
    return GradientBuckets(
        buckets,
        launch,
        training.counts.scale_for_mean,
        training.poll if training.levels is not None else group.progress.poll,
        keep_gradients=keep_gradients,
        overlap=options.overlap,
    )


def close_buckets(training: Training, buckets: GradientBuckets) -> None:
    """Take the hooks off the model, and give the buckets' memory back. Collective."""
    buckets.close()
    if training.in_window:
        for item in training.parameters:
            item.tensor.grad = None  # it may lie in a bucket
        training.group.barrier()
        give_memory_back(training, [bucket.flat for bucket in buckets.buckets])


def give_memory_back(training: Training, flats: Sequence[torch.Tensor]) -> None:
    """Give back memory of this rank's area of the window, which no rank uses any more."""
    if training.window is not None:
        for flat in flats:
            training.window.free(flat)


def pin_flats(training: Training, flats: list[torch.Tensor]) -> None:
    """Let GPUs copy from and to ``flats`` at full speed, for as long as ``training`` lives."""
    pin(training, flats if training.window is None else training.window.mappings(flats))
