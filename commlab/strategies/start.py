"""What couples a model and an optimizer to the other ranks: one start, buckets, masters, saved state, one end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from ..checkpoint import pieces
from ..collectives import operations
from ..errors import UsageError
from ..gradients.bucket import Bucket, plan, usual_bytes
from ..gradients.hooks import GradientBuckets
from ..gradients.mirror import pin
from ..gradients.parameters import NamedParameter, named_parameters
from ..native.dtypes import WIRES
from ..native.norm import scale_
from ..precision.modes import Precision
from ..runtime.group import Group
from .counts import StepWeight
from .options import Options
from .replicas import give_from_rank_0, tensors_of


class Coupled:
    """Of a strategy, all but its steps (:class:`.base.Strategy`). At construction rank 0's parameters and buffers are
    given to all ranks."""

    name: str
    keeps_gradients: ClassVar[bool] = True
    """Whether ``p.grad`` holds the reduced gradient after ``step()``."""
    shards_state: ClassVar[bool] = False
    """Whether ranks hold different pieces of the optimizer's state; else every rank holds all of it."""
    role: str = "worker"
    """"server" on a rank that only served."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        self.model, self.optimizer, self.group, self.options = model, optimizer, group, options
        self.skipped_steps = 0
        self.steps = 0
        self.parameters: list[NamedParameter] = self._named_parameters()
        self._weight = StepWeight(group)
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

    def _named_parameters(self) -> list[NamedParameter]:
        return named_parameters(self.model, self.optimizer)

    @property
    def _bucket_bytes(self) -> int:
        return self.options.bucket_bytes or usual_bytes(self.parameters, len(self.group.nodes))

    def _make_buckets(self) -> GradientBuckets | None:
        if self.options.algorithm == "window" and not self.in_window:
            raise UsageError(f"algorithm window is not to be had: {self.group.window_reason}; use auto")
        buckets = plan(self.parameters, self._bucket_bytes, WIRES[self.options.wire], self._allocate)
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

    def _local_scale(self) -> float:
        """What this rank multiplies its gradient by, so that the mean over ranks is the step's gradient."""
        return self._weight.local_scale()

    def _synchronize_model(self) -> None:
        """Make all ranks start from rank 0's parameters and buffers."""
        if self.group.size > 1:
            give_from_rank_0(self.group, tensors_of(self.model))

    def _pieces(self) -> list[pieces.Piece]:
        """What of each parameter this rank's optimizer updates; all of everything unless the state is sharded."""
        whole = {} if self.masters is None else self.masters.whole
        return [
            pieces.Piece(item, 0, item.tensor.numel(), whole.get(item.index, item.tensor)) for item in self.parameters
        ]

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

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the optimizer's state, by parameter name and range; call it between steps, without
        communication but for dedicated servers, which are asked. All ranks' parts together are the whole, whatever the
        strategy and the number of ranks. The model's own state is ``model.state_dict()``."""
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "loss_scale": None if self.precision.loss_scale is None else self.precision.loss_scale.state_dict(),
            **self._optimizer_state(),
        }

    def load_state_dict(self, *parts: dict[str, Any]) -> None:
        """Take from ``parts`` (any ranks' :meth:`state_dict`, of any strategy and number of ranks) what this rank owns.
        UsageError when a needed range is in none of them, or when they are not all of one step. With dedicated servers
        collective."""
        for key in ("steps", "skipped_steps", "loss_scale"):
            values = [part[key] for part in parts]
            if any(value != values[0] for value in values):
                raise UsageError(
                    f"rank {self.group.rank}: the parts to load differ in {key!r}: {', '.join(map(str, values))}; they "
                    "were not saved together. Load the parts of one checkpoint"
                )
        self._load_optimizer_state(parts)
        self.steps, self.skipped_steps = parts[0]["steps"], parts[0]["skipped_steps"]
        if self.precision.loss_scale is not None and parts[0]["loss_scale"] is not None:
            self.precision.loss_scale.load_state_dict(parts[0]["loss_scale"])

    def _optimizer_state(self) -> dict[str, Any]:
        return pieces.state(self._pieces(), self.optimizer)

    def _load_optimizer_state(self, parts: Sequence[dict[str, Any]]) -> None:
        pieces.load(self._pieces(), self.optimizer, parts)

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

    @property
    def serving(self) -> str:
        """How parameters are served, in a line for the user; empty where no ranks only serve."""
        return ""

    def serving_report(self) -> dict[str, str]:
        """What servers have to say at the end: rows of the summary. Collective."""
        return {}

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
