"""An LSTM on ragged batches: it learns to spell Python's own names, character by character.

    mpirun -n 2 python docs/examples/lstm.py

What it shows: names of different length make batches that weigh differently on each rank. The loss is the sum over
a rank's characters, and ``count`` their number; commlab divides once, by the characters of all ranks. (A mean of the
ranks' means would give a character of a short share more weight.) The gradient is clipped by its global norm.
"""

from __future__ import annotations

import builtins
import keyword

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import commlab

NAMES = sorted({*keyword.kwlist, *dir(builtins)})
BATCH, STEPS = 24, 60


class Speller(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, 128)

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(characters), lengths, batch_first=True, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


def ragged(names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Each name after a 0 and before another: the characters that are read, those that follow, and the lengths."""
    rows = [torch.tensor([0, *name.encode(), 0]) for name in names]
    read = pad_sequence([row[:-1] for row in rows], batch_first=True)
    follow = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=-100)  # ignored by the loss
    return read, follow, torch.tensor([len(row) - 1 for row in rows])


def main() -> None:
    group = commlab.init()
    torch.manual_seed(42)
    model = Speller()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = commlab.strategy("dps", model, optimizer, max_grad_norm=1.0)
    summed = torch.zeros(2)
    for step in range(1, STEPS + 1):
        batch = [NAMES[int(at)] for at in torch.randperm(len(NAMES))[:BATCH]]  # the same on all ranks
        read, follow, lengths = ragged(batch[group.rank :: group.size])
        scores = engine.model(read, lengths)
        loss_sum = F.cross_entropy(scores.flatten(0, 1), follow.flatten(), reduction="sum")
        engine.backward(loss_sum, count=int(lengths.sum()))
        engine.step()
        engine.zero_grad()
        summed += torch.tensor([loss_sum.item(), float(lengths.sum())])
        if step % 20 == 0:
            shares = commlab.allgather_object(int(lengths.sum()))
            commlab.allreduce(summed, op="sum", name="loss")
            if group.rank == 0:
                bits = summed[0] / summed[1] / torch.tensor(2.0).log()
                print(f"step {step}: {bits:.2f} bits per character; characters of each rank in this step: {shares}")
            summed.zero_()
    engine.close()
    commlab.shutdown()


if __name__ == "__main__":
    main()
