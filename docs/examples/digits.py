"""Image classification with BatchNorm, on real data: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.

    pip install scikit-learn
    mpirun -n 2 python docs/examples/digits.py

What it shows: every rank trains on its share of each batch, and the last batch of an epoch is smaller, so a loss goes
to ``backward`` as a sum with its count. BatchNorm normalizes with the statistics of a rank's own share; its running
statistics, which evaluation uses, become the mean of all ranks' after every step (``buffers="mean"``).
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import commlab

TRAINED, BATCH, EPOCHS = 1500, 128, 5


def network() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 2 * 2, 10))


def main() -> None:
    group = commlab.init()
    torch.manual_seed(42)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    shuffled = torch.randperm(len(labels))
    trained, held_out = shuffled[:TRAINED], shuffled[TRAINED:]

    model = network()
    steps = EPOCHS * -(-TRAINED // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    engine = commlab.strategy("dps", model, optimizer, buffers="mean")

    for epoch in range(EPOCHS):
        summed = torch.zeros(2)
        order = trained[torch.randperm(TRAINED)]  # all ranks draw the same order, and take their share of each batch
        for batch in order.split(BATCH):
            share = batch[group.rank :: group.size]
            loss_sum = F.cross_entropy(engine.model(images[share]), labels[share], reduction="sum")
            engine.backward(loss_sum, count=len(share))  # divided once, by the number of all ranks' images
            if engine.step():
                scheduler.step()
            engine.zero_grad()
            summed += torch.tensor([loss_sum.item(), len(share)])
        commlab.allreduce(summed, op="sum", name="loss")
        if group.rank == 0:
            print(f"epoch {epoch + 1}: loss {summed[0] / summed[1]:.3f}", flush=True)

    engine.settle()  # buffers alike on all ranks, before anybody evaluates
    model.eval()
    share = held_out[group.rank :: group.size]
    with torch.no_grad():
        right = (model(images[share]).argmax(1) == labels[share]).sum()
    commlab.allreduce(right, op="sum", name="right answers")
    means = commlab.allgather_parts(model[1].running_mean[None], name="running means")
    assert all(torch.equal(mean, means[0]) for mean in means), "BatchNorm's statistics differ between ranks"
    engine.close()
    if group.rank == 0:
        print(f"{right} of {len(held_out)} held-out digits are right, {100 * right / len(held_out):.1f} %")
    commlab.shutdown()


if __name__ == "__main__":
    main()
