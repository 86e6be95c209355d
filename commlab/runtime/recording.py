"""Programs that torch records while they run, to run what was recorded later: torch.jit.trace, make_fx, torch.export.

They record what torch's operators do. A collective is none of them: what is recorded would give the numbers of the
first run for ever, or whatever was in memory. So inside of them operations are refused, on all ranks. So they are
where fake tensors are made, which have no numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UsageError

tracing_state = torch._C._get_tracing_state
"""torch.jit.trace's, None outside of it; 40 ns."""
active_modes = torch._C._len_torch_dispatch_stack
"""How many modes of torch see this thread's operators; 20 ns. Without any, and no tracing state, nothing records."""
_KEYS = torch._C._TorchDispatchModeKey


def recorder() -> str:
    """What records the operators of this thread; empty where nothing does. Other modes of torch, such as counters and
    profilers, record nothing that runs later."""
    if tracing_state() is not None:
        return "torch.jit.trace"
    if active_modes() and any(torch._C._get_dispatch_mode(key) is not None for key in (_KEYS.PROXY, _KEYS.FAKE)):
        return "make_fx, torch.export or FakeTensorMode"
    return ""


def refusal(rank: int, what: str, by: str) -> UsageError:
    """Why ``rank`` can't do ``what`` inside of ``by``, and the way out."""
    return UsageError(
        f"rank {rank}: {what} inside {by}, which can't record it: what is recorded would run later without the other"
        " ranks, with numbers of now. Call it outside of that; torch.compile breaks its graphs there by itself"
    )


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within the block nothing is recorded, and tensors have numbers: to tell the other ranks."""
    from torch.utils._python_dispatch import _disable_current_modes

    state = tracing_state()
    set_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        with _disable_current_modes():
            yield
    finally:
        set_state(state)
