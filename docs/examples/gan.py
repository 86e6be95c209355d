"""A GAN: two models, two optimizers, two engines. The generator learns a ring of points.

    mpirun -n 2 python docs/examples/gan.py

What it shows: each engine has the ``zero_grad()`` of its model right before its ``backward()``, because the generator's
backward pass goes through the discriminator and leaves gradients there that are nobody's. Every rank draws noise and
data of its own, and all ranks have the same two models after every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import commlab

RADIUS, BATCH, STEPS, NOISE = 2.0, 64, 300, 8


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def points(number: int) -> Tensor:
    angles = 2 * torch.pi * torch.rand(number)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], 1) + 0.1 * torch.randn(number, 2)


def loss_of(scores: Tensor, real: bool) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))


def main() -> None:
    group = commlab.init()
    torch.manual_seed(0)
    generator, discriminator = network(NOISE, 2), network(2, 1)  # rank 0's become everybody's
    g = commlab.strategy("dps", generator, torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99)))
    d = commlab.strategy("dps", discriminator, torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.99)))
    torch.manual_seed(42 + group.rank)  # from here on each rank draws numbers of its own

    for step in range(1, STEPS + 1):
        real, fake = points(BATCH), generator(torch.randn(BATCH, NOISE))
        d.zero_grad()
        d_loss = loss_of(discriminator(real), True) + loss_of(discriminator(fake.detach()), False)
        d.backward(d_loss)
        d.step()

        g.zero_grad()
        g_loss = loss_of(discriminator(fake), True)  # after d.step(): the activations are of the new weights
        g.backward(g_loss)
        g.step()

        if step % 100 == 0:
            losses = commlab.allreduce(torch.stack([d_loss.detach(), g_loss.detach()]), name="losses")
            if group.rank == 0:
                print(f"step {step}: discriminator {losses[0]:.3f}, generator {losses[1]:.3f}", flush=True)

    g.settle()
    with torch.no_grad():
        made = generator(torch.randn(500, NOISE))
    near = made[(made.norm(dim=1) - RADIUS).abs() < RADIUS / 4]
    quarters = torch.bincount(2 * (near[:, 0] > 0) + (near[:, 1] > 0), minlength=4)
    commlab.allreduce(quarters, op="sum", name="points near the ring")
    if group.rank == 0:
        of_all = f"{quarters.sum()} of {500 * group.size}"
        print(f"{of_all} generated points lie near the ring; in each quarter of it {quarters.tolist()}")
    g.close()
    d.close()
    commlab.shutdown()


if __name__ == "__main__":
    main()
