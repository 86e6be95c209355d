"""The state of the random generators: torch's on every device, Python's and numpy's, as tensors and plain values."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch


def take(devices: Iterable[torch.device]) -> dict[str, Any]:
    """The state of this rank's generators; ``devices``: the GPUs whose generators count."""
    states: dict[str, Any] = {str(device): torch.cuda.get_rng_state(device) for device in devices}
    version, words, gauss = random.getstate()
    python = {"version": version, "words": torch.tensor(words, dtype=torch.int64, device="cpu"), "gauss": gauss}
    return {
        "cpu": torch.get_rng_state(),
        **states,
        "python": python,
        "numpy": _plain(np.random.get_state(legacy=False)),
    }


def give(state: dict[str, Any]) -> None:
    """Go on where ``state`` was taken. Older checkpoints have torch's generators alone."""
    for name, kept in state.items():
        if name == "python":
            random.setstate((kept["version"], tuple(kept["words"].tolist()), kept["gauss"]))
        elif name == "numpy":
            np.random.set_state(_arrays(kept))
        elif name == "cpu":
            torch.set_rng_state(kept)
        else:
            torch.cuda.set_rng_state(kept, name)


def draw_anew(states: Sequence[dict[str, Any]], step: int) -> None:
    """Other ranks have saved ``states``, after ``step`` steps: torch's generator of this rank draws new numbers from
    its own seed. Python's and numpy's do too, unless they were in one state on all ranks: then all ranks take that
    state, because what they have drawn alike (an order of samples, say) has to stay alike."""
    seed = (torch.initial_seed() + 7919 * step) % 2**63
    torch.manual_seed(seed)
    for name, reseed in (("python", random.seed), ("numpy", lambda seed: np.random.seed(seed % 2**32))):
        kept = [state[name] for state in states if name in state]
        if kept and all(_same(kept[0], other) for other in kept):
            give({name: kept[0]})
        elif kept:
            reseed(seed)


def _same(state: Any, other: Any) -> bool:
    if torch.is_tensor(state):
        return torch.is_tensor(other) and torch.equal(state, other)
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(_same(value, other[key]) for key, value in state.items())
    return bool(state == other)


def _plain(state: Any) -> Any:
    """numpy's state, its arrays as tensors of 64-bit integers."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"array": str(state.dtype), "numbers": torch.from_numpy(state.astype(np.int64))}
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    """The reverse of :func:`_plain`."""
    if not isinstance(state, dict):
        return state
    if state.keys() == {"array", "numbers"}:
        return state["numbers"].numpy().astype(state["array"])
    return {key: _arrays(value) for key, value in state.items()}
