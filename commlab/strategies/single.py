"""``single``: one rank, nothing is sent. What the others are measured against, and must agree with."""

from __future__ import annotations

import torch

from ..errors import UsageError
from ..runtime.group import Group
from .external import Local
from .options import Options


class Single(Local):
    """Backward, clip and step in one process. UsageError under more than one rank."""

    name = "single"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group, options: Options):
        if group.size > 1:
            raise UsageError(
                f"strategy single trains on one rank, and this job has {group.size}; start one "
                "process without mpirun, or choose another "
                "strategy"
            )
        super().__init__(model, optimizer, group, options)
