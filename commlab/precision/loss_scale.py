"""The loss scale: keeps fp16 gradients in range, by a power of two that follows what overflows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class LossScale:
    """Multiply the loss by ``value`` before backward and divide the reduced gradient by it; a step that overflowed
    anywhere is skipped everywhere. P. Micikevicius et al., "Mixed precision training", ICLR 2018."""

    value: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    growth_interval: int = 2000
    """Good steps in a row after which the scale grows."""
    good_steps: int = 0

    def update(self, overflowed: bool) -> None:
        """Take in whether one step ``overflowed``; all ranks must have agreed on that."""
        if overflowed:
            self.value, self.good_steps = max(1.0, self.value * self.backoff), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * self.growth, 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.good_steps = state["value"], state["good_steps"]
