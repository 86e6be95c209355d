"""Ray Train's workers with their gradients in memory that they share; and DDP of the same workers over commlab.

    pip install 'ray[train]'
    python docs/examples/ray_workers.py           # no mpirun: Ray starts the ranks, here two on a cluster of its own

What it shows: Ray's workers of one node are processes of one container. ``commlab.init(transport="torch")`` in the
training loop joins the ranks that Ray has numbered, and they get a window as under mpirun. A program that has DDP
names the backend instead: ``TorchConfig(backend="commlab")``. Both end with the loss of one process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import Tensor, nn
from torch.nn import functional as F

import commlab

STEPS, BATCH, WORKERS = 40, 50, 2


def prepare() -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    inputs = torch.randn(400, 10)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01), inputs, inputs.prod(1, keepdim=True).tanh()


def batches() -> list[Tensor]:
    """The samples of each step; every process draws the same."""
    order = torch.Generator().manual_seed(1)
    return [torch.randperm(400, generator=order)[:BATCH] for _ in range(STEPS)]


def with_an_engine(config: dict[str, str]) -> None:
    group = commlab.init(transport="torch")
    model, optimizer, inputs, targets = prepare()
    engine = commlab.strategy("dps", model, optimizer, max_grad_norm=1.0)
    for batch in batches():
        mine = batch[group.rank :: group.size]
        loss_sum = F.mse_loss(engine.model(inputs[mine]), targets[mine], reduction="sum")
        engine.backward(loss_sum, count=len(mine))
        engine.step()
        engine.zero_grad()
    engine.settle()
    if group.rank == 0:
        loss = F.mse_loss(model(inputs), targets).item()
        window = "a window" if group.window else "no window"
        Path(config["found"]).write_text(f"strategy dps, {window}: loss {loss:.6f}")
    engine.close()
    commlab.shutdown()


def with_ddp(config: dict[str, str]) -> None:
    bare, optimizer, inputs, targets = prepare()
    model = prepare_model(bare, move_to_device=False)
    rank = ray.train.get_context().get_world_rank()
    for batch in batches():
        mine = batch[rank::WORKERS]
        F.mse_loss(model(inputs[mine]), targets[mine]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        loss = F.mse_loss(bare(inputs), targets).item()
        Path(config["found"]).write_text(f"DDP over {torch.distributed.get_backend()}: loss {loss:.6f}")


def one_process() -> float:
    model, optimizer, inputs, targets = prepare()
    for batch in batches():
        F.mse_loss(model(inputs[batch]), targets[batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return F.mse_loss(model(inputs), targets).item()


def main() -> None:
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"scaling_config": ScalingConfig(num_workers=WORKERS)}
        common["run_config"] = RunConfig(storage_path=folder)
        common["train_loop_config"] = {"found": f"{folder}/found"}
        for loop, config in ((with_an_engine, TorchConfig()), (with_ddp, TorchConfig(backend="commlab"))):
            TorchTrainer(loop, torch_config=config, **common).fit()
            print(f"{WORKERS} workers of Ray, {Path(folder, 'found').read_text()}")
    print(f"one process: loss {one_process():.6f}")
    ray.shutdown()


if __name__ == "__main__":
    main()
