"""An asynchronous parameter server beside a straggler: two workers, one of which is slow, and a server.

    mpirun -n 3 python docs/examples/straggler.py

What it shows: under bsp every step waits for the slowest worker. Under asp a push is an update at once; workers take
their batches from a common count (``ticket()``), so the slow one takes fewer, and each batch is trained on once. Under
ssp:4 the fast worker is at most 4 steps ahead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

import commlab

BATCHES, SLOW_S = 60, 0.03


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(32, 16, generator=torch.Generator().manual_seed(number))
    return inputs, inputs.sum(1, keepdim=True)


def batches(store: commlab.ParameterServer, consistency: str) -> Iterator[int]:
    """Whoever comes first takes the next one; under bsp and ssp all workers make as many steps."""
    if consistency == "asp":
        while (number := store.ticket()) < BATCHES:
            yield number
    else:
        yield from range(store.group.rank, BATCHES, store.group.size)


def pull(store: commlab.ParameterServer, model: nn.Module) -> None:
    for handle in [store.pull(key, parameter) for key, parameter in model.named_parameters()]:
        handle.wait()


def train(consistency: str) -> None:
    torch.manual_seed(42)
    model = nn.Linear(16, 1)
    # bsp makes one update of the mean of both workers' gradients, the others one of each: half as long.
    rate = 0.04 if consistency == "bsp" else 0.02
    store = commlab.ParameterServer(model.named_parameters(), lambda params: torch.optim.SGD(params, rate), consistency)
    if store.role == "server":
        return  # the line above has returned because all workers have closed the store
    steps = 0
    began = time.monotonic()
    for number in batches(store, consistency):
        pull(store, model)
        inputs, wanted = batch(number)
        F.mse_loss(model(inputs), wanted).backward()
        if store.group.rank == 1:
            time.sleep(SLOW_S)  # the straggler
        for handle in [store.push(key, parameter.grad) for key, parameter in model.named_parameters()]:
            handle.wait()
        store.step()
        model.zero_grad()
        steps += 1
    of_each = commlab.allgather_object(steps, group=store.group)  # both have ended: all pushes are in the values
    took = time.monotonic() - began
    pull(store, model)
    inputs, wanted = batch(BATCHES)
    if store.group.rank == 0:
        loss = F.mse_loss(model(inputs), wanted).item()
        print(f"{consistency:5}: {took:.2f} s, batches of each worker {of_each}, held-out loss {loss:.4f}", flush=True)
    store.close()


def main() -> None:
    if commlab.init().size != 3:
        raise SystemExit("two workers and a server: mpirun -n 3 python docs/examples/straggler.py")
    for consistency in ("bsp", "ssp:4", "asp"):
        train(consistency)
    commlab.shutdown()


if __name__ == "__main__":
    main()
