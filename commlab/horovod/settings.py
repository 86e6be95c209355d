"""What can be set from outside, by the variables that Horovod's programs know."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import UsageError


@dataclass
class Settings:
    """How the engine's thread works."""

    fusion_bytes: int = 64 * 1024 * 1024
    """So many bytes travel together at most (HOROVOD_FUSION_THRESHOLD)."""
    cycle_s: float = 1e-3
    """So long an operation waits for others to travel with it, unless somebody waits for it (HOROVOD_CYCLE_TIME, in
    ms)."""
    warn_s: float = 10.0
    """After so long ranks that do not announce an operation are named (HOROVOD_STALL_CHECK_TIME_SECONDS)."""
    timeout_s: float = 300.0
    """After so long the operation is an error (HOROVOD_STALL_SHUTDOWN_TIME_SECONDS)."""
    mark_cycles: bool = False
    """Whether ticks are in the trace (HOROVOD_TIMELINE_MARK_CYCLES)."""


def settings_of_environment() -> Settings:
    """UsageError for a variable that is set and no number."""
    settings = Settings()
    settings.fusion_bytes = int(_number("HOROVOD_FUSION_THRESHOLD", settings.fusion_bytes))
    settings.cycle_s = _number("HOROVOD_CYCLE_TIME", settings.cycle_s * 1e3) / 1e3
    settings.warn_s = _number("HOROVOD_STALL_CHECK_TIME_SECONDS", settings.warn_s)
    settings.timeout_s = _number("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 0) or settings.timeout_s
    if os.environ.get("HOROVOD_STALL_CHECK_DISABLE") == "1":
        settings.warn_s = float("inf")
    settings.mark_cycles = os.environ.get("HOROVOD_TIMELINE_MARK_CYCLES") == "1"
    return settings


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        return float(text) if text else default
    except ValueError:
        raise UsageError(f"{name}={text!r} is set, which is no number") from None
