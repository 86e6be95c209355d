"""``python -m bench.training.slowed RANK FACTOR FLAGS``: the trainer, with one rank's forward and backward made slower.

After every backward pass that rank sleeps (FACTOR - 1) times the processor time that it has used since its forward pass
began: as if its processor were that much slower, at no cost to the ranks that share its cores here.
"""

from __future__ import annotations

import functools
import sys
import time
from contextlib import AbstractContextManager

from commlab import train
from commlab.job import launch


def slow_down(factor: float) -> None:
    """This process's training from here on."""
    import torch

    from commlab.strategies.engine import Engine
    from commlab.strategies.protocol import Strategy

    autocast, backward = Engine.autocast, Strategy.backward
    began_s = 0.0

    @functools.wraps(autocast)
    def beginning(self: Engine) -> AbstractContextManager[None]:
        nonlocal began_s
        began_s = time.process_time()
        return autocast(self)

    @functools.wraps(backward)
    def longer(self: Strategy, loss: torch.Tensor | None) -> None:
        backward(self, loss)
        if loss is not None:
            time.sleep((factor - 1) * (time.process_time() - began_s))

    Engine.autocast, Strategy.backward = beginning, longer  # type: ignore[method-assign]


def main() -> int:
    rank, factor, flags = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if launch.detect().rank == rank:
        slow_down(factor)
    return train.main(flags)


if __name__ == "__main__":
    sys.exit(main())
