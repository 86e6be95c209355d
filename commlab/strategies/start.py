"""The start of every strategy: parameters are named, all ranks get rank 0's tensors, the precision and the masters are
made, and buckets are planned, in memory that the ranks share where there is a window."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch

from ..collectives.operations import broadcast, empty
from ..errors import UsageError
from ..gradients.bucket import Bucket, plan, usual_bytes
from ..gradients.hooks import GradientBuckets, Waitable
from ..gradients.mirror import pin
from ..gradients.parameters import NamedParameter, named_parameters, plain_name
from ..native.dtypes import DTYPES, WIRES
from ..precision.masters import Masters
from ..precision.modes import Precision
from ..runtime.control import exchange_records
from ..runtime.group import Group
from ..runtime.operand import byte_view
from .counts import StepCounts
from .options import Options


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
    precision: Precision
    masters: Masters
    """What the optimizer updates for the parameters."""
    counts: StepCounts
    """The token counts of the step that is under way."""
    in_window: bool
    """Whether buckets lie in memory that the ranks share."""
    wants_norm: bool
    """Whether the verdict needs the squares: for clipping, and with a loss scale to see what overflowed only when the
    ranks' numbers were added up, where no rank packed an inf."""
    steps: int = 0
    """Steps that the engine has made, those included that the checkpoint that was loaded had made."""
    forward_wait_s: float = 0.0
    """Seconds in which forward has waited for parameters, since the engine last took them into its times."""


def start(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Group,
    options: Options,
    *,
    named: Sequence[NamedParameter] | None = None,
    synchronize: Callable[[], None] | None = None,
) -> Training:
    """Begin to train ``model`` on the ranks of ``group``. Collective. ``named``: the parameters, where the optimizer
    does not have them any more. ``synchronize()`` makes all ranks start from rank 0's parameters and buffers; None: by
    commlab's own broadcast."""
    _require_plain_step(optimizer)
    parameters = named_parameters(model, optimizer) if named is None else named
    device = next(iter(model.parameters())).device
    precision = Precision(options.precision, options.autocast, device, group, options.loss_scale)
    if synchronize is not None:
        synchronize()
    elif group.size > 1:
        copy_from_rank_0(group, tensors_of(model))
    masters = precision.masters(model, parameters, optimizer, options.apex_level)
    return Training(
        model,
        optimizer,
        group,
        options,
        parameters,
        precision,
        masters,
        StepCounts(group),
        in_window=group.window is not None and options.algorithm in ("auto", "window"),
        wants_norm=options.max_grad_norm is not None or precision.loss_scale is not None,
    )


def _require_plain_step(optimizer: torch.optim.Optimizer) -> None:
    """UsageError for an optimizer whose step wants to compute the loss again."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"optimizer {type(optimizer).__name__} wants a closure, by which its step() computes loss and gradient "
            "again and again; an engine gives it one reduced gradient a step. Take an optimizer without a closure"
        )


def start_buckets(training: Training, launch: Callable[[Bucket], Waitable], *, keep_gradients: bool) -> GradientBuckets:
    """Plan buckets for collectives, which ``launch(bucket)`` starts, and watch backward for them. Collective."""
    group, options = training.group, training.options
    if options.algorithm == "window" and not training.in_window:
        raise UsageError(f"algorithm window is not to be had: {group.window_reason}; use auto")

    def allocate(numel: int, dtype: torch.dtype) -> torch.Tensor:
        return empty(numel, dtype, group) if training.in_window else torch.empty(numel, dtype=dtype)

    bucket_bytes = options.bucket_bytes or usual_bytes(training.parameters, len(group.nodes))
    buckets = plan(training.parameters, bucket_bytes, WIRES[options.wire], allocate)
    if any(bucket.mirror is not None for bucket in buckets):
        pin_flats(training, [bucket.flat for bucket in buckets])
    return GradientBuckets(
        buckets,
        launch,
        training.counts.scale_for_mean,
        group.progress.poll,
        keep_gradients=keep_gradients,
        overlap=options.overlap,
    )


def close_buckets(training: Training, buckets: GradientBuckets) -> None:
    """Take the hooks off the model, and give the buckets' memory back. Collective."""
    buckets.close()
    window = training.group.window
    if window is not None and training.in_window:
        for item in training.parameters:
            item.tensor.grad = None  # it may lie in a bucket
        training.group.barrier()
        for bucket in buckets.buckets:
            window.free(bucket.flat)


def pin_flats(training: Training, flats: list[torch.Tensor]) -> None:
    """Let GPUs copy from and to ``flats`` at full speed, for as long as ``training`` lives."""
    window = training.group.window
    pin(training, flats if window is None or not training.in_window else window.mappings(flats))


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters, and the buffers of a dtype that travels, by name."""
    tensors = [(plain_name(name), tensor.detach()) for name, tensor in model.named_parameters()]
    return tensors + [(plain_name(name), tensor) for name, tensor in model.named_buffers() if tensor.dtype in DTYPES]


def _own_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers that an expanded tensor has in memory, of which it shows each several times; they can be written."""
    if tensor.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


def copy_from_rank_0(group: Group, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Overwrite ``tensors`` with rank 0's. Ranks that built the model from one seed have them already: a digest tells,
    and then nothing is sent. Collective."""
    digest = sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(byte_view(tensor.cpu().contiguous()).data)
    if len(set(exchange_records(group, digest.digest(), "model digest"))) == 1:
        return
    for name, tensor in tensors:
        tensor = _own_numbers(tensor)
        # The shape in the name: a broadcast itself compares numbers of numbers only.
        broadcast(tensor, 0, name=f"{name} {list(tensor.shape)}", group=group)
