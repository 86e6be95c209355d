"""Claims: an engine trains its parameters and drives its optimizer alone, from its construction to ``close()``. What
would go wrong in silence otherwise is refused here: a second engine on the same parameters, and the optimizer's own
calls, where the optimizer holds pieces, or where gradients are on their way while it would step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checkpoint.whole import refuse_to_step
from ..errors import UsageError
from ..gradients.parameters import NamedParameter

_claims: weakref.WeakSet[Claim] = weakref.WeakSet()
"""Those of all engines of this process that are not closed."""
_lock = threading.Lock()
"""Held while they are looked through, or become more or fewer: engines may be built in several threads."""


def _held() -> list[Claim]:
    with _lock:
        return list(_claims)


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def require_free_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """UsageError where another engine, or another library, drives ``optimizer``."""
    if type(optimizer).__module__.partition(".")[0] == "horovod" or hasattr(optimizer, "_allreduce_grad_async"):
        raise UsageError(
            f"the optimizer is Horovod's {type(optimizer).__name__}, which exchanges gradients itself; give strategy() "
            "the optimizer without it"
        )
    for claim in _held():
        if claim.optimizer is optimizer:
            raise UsageError(f"the optimizer is driven by {claim.who} already; {_CLOSE_FIRST}")


def require_free_model(model: torch.nn.Module, parameters: Sequence[NamedParameter]) -> None:
    """UsageError where another engine, or another library's wrapper, trains one of ``parameters``."""
    for module in model.modules():
        wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None)
        if wrapper and type(module).__module__.startswith("torch."):
            raise UsageError(
                f"the model has a {wrapper}, which exchanges gradients itself; give strategy() the model without it"
            )
    for claim in _held():
        trained = {id(item.tensor) for item in claim.parameters}
        for item in parameters:
            if id(item.tensor) in trained:
                raise UsageError(f"parameter {item.name!r} is trained by {claim.who} already; {_CLOSE_FIRST}")


_CLOSE_FIRST = "call close() on that engine first, which gives model and optimizer back"


class Claim:
    """An engine's hold on ``parameters`` and ``optimizer``. ``sharded``: the optimizer holds pieces or masters, which
    mean nothing outside of the engine. ``zero_grad``: the engine's; ``before_step``: is called before each step of the
    optimizer, and refuses those that are not the engine's."""

    def __init__(
        self,
        strategy: str,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[NamedParameter],
        zero_grad: Callable[[], None],
        before_step: Callable[..., None],
        *,
        sharded: bool,
    ):
        self.who = f"an engine of strategy {strategy}"
        self.optimizer = optimizer
        self.train(parameters)
        self._strategy = strategy
        self._handles: list[Any] = []
        with _lock:
            _claims.add(self)
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            return  # of a class that does not call torch.optim.Optimizer's constructor
        self._handles.append(optimizer.register_step_pre_hook(before_step))
        optimizer.zero_grad = lambda set_to_none=True: zero_grad()  # type: ignore[method-assign]
        if sharded:
            self._refuse("state_dict()", "engine.state_dict(), this rank's part, or commlab.checkpoint.Checkpoints")
            self._refuse("load_state_dict()", "engine.load_state_dict(*parts), or commlab.checkpoint.Checkpoints")
            for name in ("__deepcopy__", "__reduce_ex__"):
                setattr(optimizer, name, self._refuse_copy)

    def train(self, parameters: Sequence[NamedParameter]) -> None:
        """From now on the engine trains ``parameters``."""
        self.parameters = parameters
        # torch.utils.swap_tensors() would take the hooks off a parameter in silence. It refuses a tensor that has weak
        # references.
        self._pins = [weakref.ref(item.tensor) for item in parameters]

    def _refuse(self, call: str, instead: str) -> None:
        def refuse(*_: Any) -> None:
            raise UsageError(
                f"optimizer.{call} of an optimizer that {self.who} drives: here the optimizer holds what this rank "
                f"updates, under the engine's own tensors. Use {instead}; engine.close() gives the optimizer back whole"
            )

        register = getattr(self.optimizer, f"register_{call.removesuffix('()')}_pre_hook")
        self._handles.append(register(refuse))

    def _refuse_copy(self, *_: Any) -> Any:
        raise UsageError(
            f"a copy of an optimizer that {self.who} drives: here the optimizer holds what this rank updates. Use "
            "engine.state_dict(); engine.close() gives the optimizer back whole"
        )

    def release(self, *, spent: bool) -> None:
        """Let go. ``spent``: what the optimizer remembered is lost, so that its next step would not be what its user
        expects."""
        with _lock:
            _claims.discard(self)
        self._pins.clear()
        for handle in self._handles:
            handle.remove()
        for name in ("zero_grad", "__deepcopy__", "__reduce_ex__"):
            self.optimizer.__dict__.pop(name, None)
        if spent:
            refuse_to_step(
                self.optimizer,
                "this optimizer's state was dropped by engine.close(state=False); call close() without it to go on "
                "with the optimizer, or make another one",
            )
