"""``python -m bench.training.slowed RANK FACTOR FLAGS``: the trainer, with one rank's forward and backward made slower.

At the end of every backward pass that rank sleeps (FACTOR - 1) times the processor time that it has used since its
forward pass began: as if its processor were that much slower, at no cost to the ranks that share its cores here.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from commlab import train
from commlab.job import launch


class SlowModel:
    """Makes the first model that is called from here on slower, by torch's own hooks; :meth:`remove` ends that."""

    def __init__(self, factor: float):
        from torch.nn.modules.module import register_module_forward_pre_hook

        self.factor = factor
        self._model: object = None
        self._began_s = 0.0
        # The first module that is called is the whole model; its inner modules are called from there.
        self._hooks: list[Any] = [register_module_forward_pre_hook(self._forward_begins)]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _forward_begins(self, module: Any, inputs: object) -> None:
        if self._model is None:
            from torch.autograd.graph import register_multi_grad_hook

            self._model = module
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            self._hooks.append(register_multi_grad_hook(trained, self._backward_ends))
        if module is self._model:
            self._began_s = time.process_time()

    def _backward_ends(self, gradients: object) -> None:
        time.sleep((self.factor - 1) * (time.process_time() - self._began_s))


def main() -> int:
    rank, factor, flags = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if launch.detect().rank == rank:
        SlowModel(factor)
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main())
