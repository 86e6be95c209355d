"""What every strategy shares: one engine call for the user, buckets on their way during backward, one agreed norm and
clip."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from .. import trace
from ..collectives import ALGORITHMS, operations
from ..collectives.allreduce import allreduce_async
from ..collectives.execute import byte_view
from ..collectives.group import Group
from ..collectives.handle import Handle
from ..errors import CommlabError, UsageError
from ..gradients.bucket import Bucket, GradientBuckets, NamedParameter, named_parameters, plan
from ..gradients.mirror import pin
from ..gradients.norm import clip_factor, norm_squared
from ..gradients.scaling import LossScale
from ..gradients.wire import WIRES
from ..native.arithmetic import DTYPES
from ..precision import Precision
from . import pieces


@dataclass(frozen=True)
class Options:
    """What the user may choose for any strategy."""

    algorithm: str = "auto"
    precision: str = "fp32"
    autocast: str = "auto"
    """16-bit matrix products, for precision bf16 and fp16: auto (where they are fast), on, off."""
    loss_scale: LossScale | None = None
    """Where it starts, and how it grows and falls, for precision fp16 and apex; None: as LossScale() does."""
    apex_level: str | None = None
    """For precision apex: O1 or O2 of apex.amp, where Apex still has it; None: without apex.amp, as O2."""
    wire: str | None = None
    max_grad_norm: float | None = None
    """Clip the reduced gradient to this global 2-norm; None: don't compute it."""
    bucket_bytes: int = 25 * 2**20
    overlap: bool = True
    """Buckets leave while backward goes on; False: the same buckets, once it has ended. For ps, dps and allreduce."""
    elementwise: bool | None = None
    """Say True for an optimizer of your own that updates every number from that number's own gradient and state
    alone."""
    servers: int | None = None
    """Ranks that only serve, for ps (1) and dps (2 and more); None: every rank trains, and serves."""
    consistency: str = "bsp"
    """When a worker may read, where there are such servers: bsp, ssp:S, asp."""
    overlap_pulls: bool = False
    """Where there are such servers: step() does not wait for the new parameters; the next forward does, for each where
    it first reads it. Until then only forward, ``state_dict()`` and ``engine.settle()`` may look at parameters."""


class Agreement(NamedTuple):
    """What all ranks know of a step's reduced gradient."""

    squares: float
    """Sum of the squares of all numbers, times the square of the loss scale; 0 where it is not wanted."""
    finite: bool
    """Whether there is no inf or NaN in it, nor was in what any rank packed."""
    unused: set[int]
    """Parameters (by index) without a gradient on any rank."""


@dataclass
class Times:
    """Seconds in which this rank's model stood still, since the user last put in a new one."""

    exchange_s: float = 0.0
    """Packing and launching inside backward, waiting for peers, agreeing on the norm, pulling parameters."""
    forward_wait_s: float = 0.0
    """Of ``exchange_s``: waiting for pulls inside forward."""
    update_s: float = 0.0
    """Clipping and the optimizer."""


class Waitable(Protocol):
    """A bucket's exchange under way."""

    @property
    def result(self) -> Any: ...

    def wait(self, timeout_s: float | None = None) -> Any: ...


_VERDICT = struct.Struct("<d??")


def scale_(gradients: list[torch.Tensor], factor: float) -> None:
    """Multiply all of them in place."""
    if gradients and factor != 1.0:
        torch._foreach_mul_(gradients, factor)


class Strategy:
    """How gradients become agreed updates. Built by :func:`commlab.strategy`; all ranks must make the same calls.

    ``model``: what to call in the training loop (the user's own model, but for ``ddp``). At construction rank 0's
    parameters and buffers are given to all ranks.
    """

    name: str
    keeps_gradients: ClassVar[bool] = True
    """Whether ``p.grad`` holds the reduced gradient after :meth:`step`."""
    averages: bool = True
    """Whether the ranks' gradients of a step become one; under ssp and asp they do not."""
    role: str = "worker"
    """"server" on a rank that only served."""
    shards_state: ClassVar[bool] = False
    """Whether ranks hold different pieces of the optimizer's state; else every rank holds all of it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        if options.wire not in WIRES:
            raise UsageError(f"unknown wire {options.wire!r}; there are none, fp16, bf16")
        algorithms = ("auto", *ALGORITHMS, "window", "hierarchical")
        if options.algorithm not in algorithms:
            raise UsageError(f"unknown algorithm {options.algorithm!r}; there are {', '.join(algorithms)}")
        if options.max_grad_norm is not None and not options.max_grad_norm > 0:
            raise UsageError(f"max_grad_norm must be positive, not {options.max_grad_norm}; None turns clipping off")
        self.model, self.optimizer, self.group, self.options = model, optimizer, group, options
        self.grad_norm: float | None = None
        """Global 2-norm of the last step's reduced gradient, before clipping; None where max_grad_norm is None."""
        self.skipped_steps = 0
        self.steps = 0
        self.times = Times()
        self.parameters: list[NamedParameter] = self._named_parameters()
        self._share = 0.0
        """What this step's losses were divided by on their way into fp16; 0 before the first backward."""
        self._count = 0
        self._total: int | None = None
        self._counted: bool | None = None
        self._global_count: Handle | None = None
        self._syncing = True
        self._backward_done = False
        self._stale = False
        self._launched: list[tuple[Bucket, Waitable]] = []
        self.in_window = group.window is not None and options.algorithm in ("auto", "window")
        """Whether buckets lie in memory that the ranks share."""
        device = next(iter(model.parameters())).device
        self.precision = Precision(options.precision, options.autocast, device, group, options.loss_scale)
        self._synchronize_model()
        self.masters = self.precision.masters(model, self.parameters, optimizer, options.apex_level)
        """What the optimizer updates in the parameters' place, for precision apex."""
        self.buckets = self._make_buckets()
        if self.masters is not None:
            self._bind_masters()

    # What differs between strategies.

    def _named_parameters(self) -> list[NamedParameter]:
        return named_parameters(self.model, self.optimizer)

    def _make_buckets(self) -> GradientBuckets | None:
        if self.options.algorithm == "window" and not self.in_window:
            raise UsageError(f"algorithm window is not to be had: {self.group.window_reason}; use auto")
        buckets = plan(self.parameters, self.options.bucket_bytes, WIRES[self.options.wire], self._allocate)
        if any(bucket.mirror is not None for bucket in buckets):
            self._pin([bucket.flat for bucket in buckets])
        return GradientBuckets(
            buckets,
            self._launch,
            self._local_scale,
            self.group.progress.poll,
            keep_gradients=self.keeps_gradients,
            overlap=self.options.overlap,
        )

    def _allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return operations.empty(numel, dtype, self.group) if self.in_window else torch.empty(numel, dtype=dtype)

    def _pin(self, flats: list[torch.Tensor]) -> None:
        """Let GPUs copy from and to ``flats`` at full speed."""
        window = self.group.window
        pin(self, flats if window is None or not self.in_window else window.mappings(flats))

    def _launch(self, bucket: Bucket) -> None:
        """Start a packed bucket on its way; append its handle to ``_launched``."""
        raise NotImplementedError

    def _owned_gradients(self) -> list[torch.Tensor]:
        """After the exchange: tensors that, over all ranks, hold every number of the reduced gradient exactly once."""
        raise NotImplementedError

    def _update(self, clip: float, unused: set[int]) -> None:
        """Multiply the gradient by ``clip`` (and 1 / loss scale) and step the optimizer; parameters in ``unused`` had
        no gradient on any rank."""
        raise NotImplementedError

    def _pull(self) -> None:
        """Give every rank the updated parameters, where they were updated elsewhere."""

    # The engine call.

    def autocast(self) -> AbstractContextManager[None]:
        """Context for the forward pass and the loss: the precision's compute dtype."""
        return self.precision.autocast()

    def backward(self, loss: torch.Tensor | None, count: int | None = None, total: int | None = None) -> None:
        """Compute gradients and start them on their way. Collective, unless inside :meth:`no_sync`.

        ``loss``: a scalar. Without ``count`` the gradients of all ranks' losses are averaged. With ``count``, ``loss``
        is a *sum* over that many items (tokens), and the step's gradient is the sum over all ranks and micro-batches
        divided once by the global count, so ragged batches weigh right. ``total``: the step's global count over all
        ranks and micro-batches, where the caller knows it; else the ranks' counts are summed by one more small
        exchange. A rank with nothing to do passes ``None, 0``. One call per step outside ``no_sync``.
        """
        if self._backward_done:
            raise UsageError(
                "a second backward() in one step: run all but the last inside engine.no_sync(), "
                "and call engine.step() after the last"
            )
        if self._counted is not None and self._counted != (count is not None):
            raise UsageError("within one step either every backward() call is given a count, or none")
        if loss is None and count != 0:
            raise UsageError("backward(None) is for a rank without samples: pass count=0 with it")
        if self._stale:
            raise UsageError("gradients of the last step are still there: call engine.zero_grad() after engine.step()")
        self._counted = count is not None
        self._count += count or 0
        self._total = total
        if self._syncing and self._counted and total is None and self.averages:
            counted = torch.tensor([self._count], dtype=torch.int64)
            self._global_count = allreduce_async(counted, "sum", "token count", group=self.group)
        if self.buckets is not None:
            self.buckets.syncing = self._syncing
        if self.precision.loss_scale is not None and not self._share:
            # A sum over thousands of tokens would leave no room for the scale: it becomes about a mean before backward.
            self._share = max(1.0, total / self.group.size if total is not None else 1.0)
        scale = self.precision.scale / (self._share or 1.0)
        self._run_backward(loss if loss is None or scale == 1.0 else loss * scale)
        if self.buckets is not None and self._syncing:
            self.buckets.flush()
            self.times.exchange_s += self.buckets.launch_s
        # Last: a backward pass that ended in an exception can be dropped, by zero_grad().
        self._backward_done = self._syncing

    def _run_backward(self, loss: torch.Tensor | None) -> None:
        if loss is not None:
            with trace.span("backward"):
                loss.backward()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward() only accumulates on this rank; for all micro-batches of a step but the last. Put the
        forward pass inside too: there ``ddp`` decides whether to exchange."""
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    def step(self) -> bool:
        """Finish the exchange, clip, update, and give every rank the new parameters. Collective. Returns whether there
        was an update: with precision fp16 a step whose gradient overflowed on any rank is skipped on all of them, and a
        scheduler should not advance then."""
        if not self._backward_done:
            raise UsageError("step() without a backward() outside no_sync(): there is no gradient to agree on")
        started_s = time.perf_counter()
        with trace.span("exchange"):
            for _, handle in self._launched:
                handle.wait()
            agreement = self._agree()
        agreed_s = time.perf_counter()
        with trace.span("update"):
            scale, loss_scale = self.precision.scale, self.precision.loss_scale
            updates = loss_scale is None or agreement.finite
            if loss_scale is None and not agreement.finite and self.options.wire is not None:
                raise CommlabError(
                    f"rank {self.group.rank}: in step {self.steps} the gradient of some rank is not finite on wire "
                    f"{self.options.wire} (an overflow, inf or NaN); nothing was updated. Use precision fp16, which "
                    "scales the loss and skips such steps, or wire bf16 or none"
                )
            clip = 1.0
            if self.options.max_grad_norm is not None:
                self.grad_norm = agreement.squares**0.5 / scale
                clip = clip_factor(self.grad_norm, self.options.max_grad_norm)
            if updates:
                self._update(clip / scale, agreement.unused)
            else:
                self.skipped_steps += 1
            if loss_scale is not None:
                loss_scale.update(not updates)
        updated_s = time.perf_counter()
        with trace.span("pull"):
            self._pull()
        self.times.exchange_s += agreed_s - started_s + time.perf_counter() - updated_s
        self.times.update_s += updated_s - agreed_s
        self._begin_step()
        self._stale = self.keeps_gradients
        self.steps += 1
        return updates

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward starts anew; what was accumulated inside :meth:`no_sync`, and
        what a backward pass has left that ended in an exception on all ranks, too."""
        if self._backward_done:
            raise UsageError(
                "zero_grad() between backward() and step(): the gradients are on their way "
                "already; call it after step()"
            )
        if self.buckets is not None:
            self.buckets.launch_packed()
        for _, handle in self._launched:
            handle.wait()
        for parameter in self.parameters:
            parameter.tensor.grad = None
        self._begin_step()

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the optimizer's state, by parameter name and range; no communication. All ranks' parts
        together are the whole, whatever the strategy and the number of ranks. The model's own state is
        ``model.state_dict()``."""
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "loss_scale": None if self.precision.loss_scale is None else self.precision.loss_scale.state_dict(),
            **pieces.state(self._pieces(), self.optimizer),
        }

    def load_state_dict(self, *parts: dict[str, Any]) -> None:
        """Take from ``parts`` (any ranks' :meth:`state_dict`, of any strategy and number of ranks) what this rank owns.
        UsageError when a needed range is in none of them, or when they are not all of one step."""
        for key in ("steps", "skipped_steps", "loss_scale"):
            values = [part[key] for part in parts]
            if any(value != values[0] for value in values):
                raise UsageError(
                    f"rank {self.group.rank}: the parts to load differ in {key!r}: {', '.join(map(str, values))}; they "
                    "were not saved together. Load the parts of one checkpoint"
                )
        pieces.load(self._pieces(), self.optimizer, parts)
        self.steps, self.skipped_steps = parts[0]["steps"], parts[0]["skipped_steps"]
        if self.precision.loss_scale is not None and parts[0]["loss_scale"] is not None:
            self.precision.loss_scale.load_state_dict(parts[0]["loss_scale"])

    @property
    def serving(self) -> str:
        """How parameters are served, in a line for the user; empty where no ranks only serve."""
        return ""

    def serving_report(self) -> dict[str, str]:
        """What servers have to say at the end: rows of the summary. Collective."""
        return {}

    def turns(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(step, whose share of it), in the order in which this rank is to train on them, until all shares of steps
        ``start .. stop - 1`` are given out. In lockstep each rank has its own share of every step; where ranks do not
        wait for each other, whoever is free gets the next one that nobody has."""
        yield from ((step, self.group.rank) for step in range(start, stop))

    def settle(self, last: bool = False) -> None:
        """Make every rank's parameters the newest, in full precision, before they are evaluated or saved. Collective.
        ``last``: this rank will train no more. Where every step ends so by itself, nothing is done."""

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        """Run ``change(model)``, which writes parameters in place, so that it takes effect once on every copy: under
        ``dps`` and ``ps`` ranks of a node share one. Collective."""
        with torch.no_grad():
            change(self.model)
            self._follow_parameters()

    def _follow_parameters(self) -> None:
        """Masters of parameters that somebody else has written take the new value."""
        if self.masters is not None and self.masters.separate:
            for piece in self._pieces():
                parameter = pieces.parameter_of(piece)
                changed = piece.tensor.to(parameter.dtype) != parameter
                piece.tensor.copy_(torch.where(changed, parameter.float(), piece.tensor))

    def close(self) -> None:
        """Take the hooks off the model and give the window's memory back. The model stays as it is; the engine is of no
        more use. Collective."""
        if self.buckets is not None:
            self.buckets.close()
            if self.in_window:
                assert self.group.window is not None
                for parameter in self.parameters:
                    parameter.tensor.grad = None
                self.group.barrier()
                for bucket in self.buckets.buckets:
                    self.group.window.free(bucket.flat)

    # Shared parts.

    def _begin_step(self) -> None:
        self._launched.clear()
        if self.buckets is not None:
            self.buckets.reset()
        self._count, self._total, self._counted, self._global_count = 0, None, None, None
        self._backward_done = self._stale = False
        self._share = 0.0

    def _pieces(self) -> list[pieces.Piece]:
        """What of each parameter this rank's optimizer updates; all of everything unless the state is sharded."""
        whole = {} if self.masters is None else self.masters.whole
        return [
            pieces.Piece(item, 0, item.tensor.numel(), whole.get(item.index, item.tensor)) for item in self.parameters
        ]

    # Precision apex.

    def _bind_masters(self) -> None:
        pieces.rebind(self.optimizer, self._pieces())

    def _unscale(self) -> bool:
        """Give the masters of what this rank updates their gradients, divided by the loss scale; whether these are
        finite. Nothing to do in other precisions."""
        return True

    def _update_masters(self, clip: float) -> None:
        """Clip, step, and give the parameters the masters' values."""
        assert self.masters is not None
        updated = self._pieces()
        scale_([piece.tensor.grad for piece in updated if piece.tensor.grad is not None], clip)
        self.optimizer.step()
        for piece in updated:
            piece.tensor.grad = None
        if self.masters.separate:
            self.masters.apex.scale(
                [piece.tensor for piece in updated], [pieces.parameter_of(piece) for piece in updated], 1.0
            )

    def _local_scale(self) -> float:
        """What this rank multiplies its gradient by, so that the mean over ranks is the step's gradient."""
        return (self._share or 1.0) * (self.group.size / self._total_count() if self._counted else 1.0)

    def _total_count(self) -> int:
        if self._total is not None:
            return max(1, self._total)
        assert self._global_count is not None
        return max(1, int(self._global_count.wait().item()))

    def _agree(self) -> Agreement:
        """One small exchange after the last bucket: the squared norm, summed in rank order so that all ranks get the
        same bits, whether all gradients are finite, and whether any rank has unused parameters; if so, a second one
        finds those unused on all."""
        assert self.buckets is not None
        squares = 0.0
        # With a loss scale also to see what overflowed only when it was added up: no rank packed an inf then.
        if self.options.max_grad_norm is not None or self.precision.loss_scale is not None:
            squares = norm_squared(self._owned_gradients())
        finite_here = self.buckets.finite and math.isfinite(squares) and self._unscale()
        unused = {item.index for item in self.parameters} - self.buckets.used
        if self.group.size == 1:
            return Agreement(squares, finite_here, unused)
        records = self.group.exchange_records(_VERDICT.pack(squares, finite_here, bool(unused)), "norm")
        parts, finite, some_unused = zip(*(_VERDICT.unpack(record) for record in records), strict=True)
        if any(some_unused):
            used = bytearray(len(self.parameters))
            for index in self.buckets.used:
                used[index] = 1
            maps = self.group.exchange_records(bytes(used), "used parameters")
            unused = {index for index in range(len(used)) if not any(row[index] for row in maps)}
        return Agreement(sum(parts), all(finite), unused)

    def _synchronize_model(self) -> None:
        """Make all ranks start from rank 0's parameters and buffers. Ranks that built the model from one seed have them
        already: a digest tells, and then nothing is sent."""
        if self.group.size > 1:
            self._give_from_rank_0(self._model_tensors())

    def _model_tensors(self) -> list[tuple[str, torch.Tensor]]:
        tensors = [(name, tensor.data) for name, tensor in self.model.named_parameters()]
        return tensors + [(name, tensor) for name, tensor in self.model.named_buffers() if tensor.dtype in DTYPES]

    def _give_from_rank_0(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        digest = sha256()
        for name, tensor in tensors:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(byte_view(tensor.cpu().contiguous()).data)
        if len(set(self.group.exchange_records(digest.digest(), "model digest"))) == 1:
            return
        for name, tensor in tensors:
            # The shape in the name: a broadcast itself compares numbers of numbers only.
            operations.broadcast(tensor, 0, name=f"{name} {list(tensor.shape)}", group=self.group)
