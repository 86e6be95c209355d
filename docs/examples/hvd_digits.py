"""A script of Horovod, with one line changed: digits of 8 x 8 pixels, real data from scikit-learn.

    pip install scikit-learn
    mpirun -n 2 python docs/examples/hvd_digits.py

What it shows: a program that was written for Horovod trains through commlab when its import is replaced; every other
line is as Horovod's own guide has it. The ranks share each batch, so the losses are those of one process that trains on
the whole batch (``mpirun -n 1``), but for the last digits: the sum of the gradients is rounded in another order.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import commlab.horovod.torch as hvd  # was: import horovod.torch as hvd

TRAINED, BATCH, EPOCHS = 1500, 60, 5  # BATCH is that of all ranks together: 1, 2, 3, 4, 5 or 6 of them share it evenly


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def main() -> None:
    hvd.init()
    torch.manual_seed(42)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    trained = TensorDataset(images[:TRAINED], labels[:TRAINED])
    sampler: DistributedSampler[object] = DistributedSampler(trained, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(trained, batch_size=BATCH // hvd.size(), sampler=sampler)

    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        summed = torch.zeros(())
        for batch, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), targets)
            loss.backward()
            optimizer.step()
            summed += loss.detach()
        mean = hvd.allreduce(summed / len(loader), name="loss")
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: loss {mean:.6f}", flush=True)

    with torch.no_grad():
        right = (model(images[TRAINED:]).argmax(1) == labels[TRAINED:]).float().mean()
    if hvd.rank() == 0:
        print(f"{hvd.size()} ranks: {100 * right:.1f} % of {len(labels) - TRAINED} held-out digits are right")
    hvd.shutdown()


if __name__ == "__main__":
    main()
