"""``horovod``: the real Horovod, behind the same engine call and through its public API alone. A peer, not ours.

Horovod's background thread negotiates which tensors are ready on all ranks, fuses them, and allreduces; its hooks start
it during backward. ``wire="fp16"`` is its Compression.fp16, which adds in fp16 and rounds at every hop. A. Sergeev, M.
Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", arXiv 1802.05799.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import trace
from ..errors import AgreedError, UsageError
from ..runtime.elsewhere import waiting_elsewhere
from ..runtime.group import Group
from .changes import Roster
from .external import External
from .options import Options

_engines: set[Horovod] = set()
"""Those that are not closed: Horovod, of which a process has one, ends with the last of them."""


def _import() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise UsageError(
            f"strategy horovod needs Horovod built for this Python, torch and MPI ({error}); run "
            "`make horovod`, which builds it from "
            "its sources, or choose strategy allreduce"
        ) from error
    return hvd


class Horovod(External):
    """All ranks make the same update from gradients that Horovod has averaged.

    Horovod's ``step()`` is ``synchronize()`` and then the optimizer's own. Here clipping comes in between, so that it
    sees the averaged gradient, and the user's optimizer, which has the state and the scheduler, takes the step.
    """

    name = "horovod"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        self._hvd = hvd = _import()
        if not hvd.is_initialized():
            hvd.init()
        if (hvd.rank(), hvd.size()) != (group.rank, group.size):
            raise UsageError(
                f"strategy horovod: Horovod is rank {hvd.rank()} of {hvd.size()}, the group rank "
                f"{group.rank} of {group.size}; Horovod "
                "works on all ranks of an MPI job, with transport mpi"
            )

        super().__init__(model, optimizer, group, options)
        _engines.add(self)
        parameters = self.training.parameters
        # Horovod hooks the parameters that an optimizer has. The user's own may have masters, which see no backward, so
        # Horovod gets another one, which never steps.
        self._distributed = hvd.DistributedOptimizer(
            torch.optim.SGD([item.tensor for item in parameters], lr=0.0),
            named_parameters=[(item.name, item.tensor) for item in parameters],
            compression=hvd.Compression.fp16 if options.wire == "fp16" else hvd.Compression.none,
        )

    def backward(self, loss: torch.Tensor | None, retain_graph: bool) -> None:
        # How many backward passes there are until Horovod is to reduce: this one, or this one and more.
        self._distributed.set_backward_passes_per_step(1 if self.buckets.syncing else 2)
        super().backward(loss, retain_graph)

    def complete(self) -> None:
        with (
            trace.span("exchange"),
            waiting_elsewhere(self.training.group, f"Horovod's exchange of step {self.training.steps + 1}"),
        ):
            self._distributed.synchronize()
        super().complete()

    def replan(self, roster: Roster) -> None:
        raise AgreedError(
            "strategy horovod: Horovod hooks the parameters that it was given, and can't be given others; call "
            "engine.close(), and build a new engine with commlab.strategy()"
        )

    def close(self, *, state: bool) -> None:
        super().close(state=state)
        _engines.discard(self)
        if not _engines:
            self._hvd.shutdown()
