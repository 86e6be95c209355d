"""Models of a few hundred numbers, of the kinds that users train, with their data."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 6
VOCABULARY = 11
LENGTH = 4


class Tied(nn.Module):
    """The first and the last layer share their weight; one parameter is not contiguous, one has no dimension, one no
    number, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.turned = nn.Parameter(torch.randn(7, WIDTH).div(WIDTH**0.5).t())
        self.last = nn.Linear(7, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.out.weight = self.first.weight
        self.fixed = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)
        self.offset = nn.Parameter(torch.tensor(0.1))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x)) * self.fixed @ self.turned
        found: torch.Tensor = self.out(torch.tanh(self.last(hidden))) + self.offset + self.empty.sum()
        return found


class Rare(nn.Module):
    """``some`` sees only samples whose first number is above 0.5, ``spare`` none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.some = nn.Linear(WIDTH, WIDTH)
        self.spare = nn.Linear(5, 3)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        rare = (x[:, 0] > 0.5).nonzero()[:, 0]
        if len(rare):
            hidden = hidden.index_add(0, rare, self.some(hidden[rare]))
        found: torch.Tensor = self.last(hidden)
        return found


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(WIDTH // 2, 5, batch_first=True)
        self.last = nn.Linear(5, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.cells(x.view(len(x), 2, WIDTH // 2))[0][:, -1])
        return found


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.words((x * 3).long() % VOCABULARY).mean(1)))
        return found


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 3, 3, padding=1)
        self.last = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.first(x[:, None])).flatten(1))
        return found


class Normalized(nn.Module):
    """Layer normalization, and buffers of dtypes that take part in no sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, WIDTH)
        self.register_buffer("mask", torch.arange(8) % 3 > 0)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.relu(self.first(x))) * self.mask
        found: torch.Tensor = self.last(hidden) * self.scale
        return found


def make_model(kind: str, seed: int, dtype: torch.dtype) -> nn.Module:
    """The model of a kind, of ``MODELS`` in :mod:`.programs`; the same seed makes the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "mlp":
            model: nn.Module = nn.Sequential(
                nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, WIDTH)
            )
        else:
            kinds = {
                "tied": Tied,
                "rare": Rare,
                "lstm": Recurrent,
                "embedding": Words,
                "conv": Convolved,
                "norms": Normalized,
            }
            model = kinds[kind]()
    return model.to(dtype)


def samples(seed: int, step: int, rank: int, micro_batch: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """(3, count, WIDTH): inputs, targets, and in the third plane's first column the samples' weights, above 0; distinct
    for every argument."""
    generator = torch.Generator().manual_seed(((seed * 1009 + step) * 101 + rank) * 11 + micro_batch)
    made = torch.rand(3, count, WIDTH, generator=generator, dtype=torch.float64)
    made[1] -= 0.5
    made[2] += 0.1
    return made.to(dtype)
