"""bench.overlap on a model that needs no transformers, which take seconds to import; also as a program."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch

from bench import overlap
from bench.contestants import training_step


class Tiny(torch.nn.Module):
    """Called like GPT-2, with tied embeddings like it."""

    def __init__(self, layers: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(training_step.VOCABULARY, 8)
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(layers)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.layers(self.embedding(input_ids)) @ self.embedding.weight.t())


def build(*_: Any, seed: int, **__: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return Tiny(5)


if __name__ == "__main__":
    training_step.build_model = build  # type: ignore[assignment]
    sys.exit(overlap.main())
