"""Resume after a kill: the steps that are done again have the same bits.

    mpirun -n 2 python docs/examples/resume.py checkpoints --kill-at 28    # dies; the launcher says so
    mpirun -n 2 python docs/examples/resume.py checkpoints                 # goes on after step 20

What it shows: one script serves the first start and every restart. Both runs print the loss of step 25, with all its
digits. A checkpoint holds the model, the optimizer's state
of all ranks, the scheduler and the random state (dropout draws on), and becomes visible when it is whole. ``more`` is
for the loop's own numbers. Every rank writes its share of the state; any number of ranks can read it.
"""

from __future__ import annotations

import argparse
import os
import signal

import torch
from torch import nn
from torch.nn import functional as F

import commlab
from commlab.checkpoint import Checkpoints

STEPS, EVERY = 40, 10


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", help="where the checkpoints lie: on a file system that all ranks see")
    arguments.add_argument("--kill-at", type=int, metavar="STEP", help="the last rank kills itself (SIGKILL) there")
    options = arguments.parse_args()

    group = commlab.init()
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    engine = commlab.strategy("dps", model, optimizer)
    checkpoints = Checkpoints(options.folder, model, engine, scheduler)

    start, more = checkpoints.restore() or (0, {"seen": 0})
    seen = more["seen"]
    if group.rank == 0:
        print(f"begins after step {start}, {seen} samples seen", flush=True)
    for step in range(start + 1, STEPS + 1):
        data = torch.Generator().manual_seed(1000 * step + group.rank)  # a step's samples follow from its number
        inputs = torch.randn(32, 16, generator=data)
        loss = F.mse_loss(engine.model(inputs), inputs.sin().sum(1, keepdim=True))
        engine.backward(loss)
        engine.step(step)
        engine.zero_grad()
        scheduler.step()
        seen += 32 * group.size
        if step % EVERY == 0:
            checkpoints.save(step, {"seen": seen})
        if step % (EVERY // 2) == 0 and group.rank == 0:
            print(f"step {step}: loss {loss.item()!r}{', saved' * (step % EVERY == 0)}", flush=True)
        if step == options.kill_at and group.rank == group.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if group.rank == 0:
        print(f"ends after step {STEPS}, {seen} samples seen", flush=True)
    checkpoints.close()
    engine.close()
    commlab.shutdown()


if __name__ == "__main__":
    main()
