"""The short way of an operation: all between its caller and the one native call that it is, natively too
(kernels/bind_at_once.cpp). In Python it takes three times as long as the call itself with few numbers in the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import trace
from ..native import library
from .recording import active_modes, tracing_state
from .waiting import under_way

PATIENCE_US = 1e5
"""A native call comes back after this long: for signals, and to see who is silent."""
PATIENCE_FOR_OTHERS_US = 1e3
"""The same where other groups or stores have operations under way, which must be moved on."""

at_once: Callable[..., bool] | None = getattr(library.built, "at_once", None)
""":meth:`.group.Group.at_once`; None where no native module was built, which then offers no such operations."""


@dataclass
class _Standing:
    sequence: int = 0
    bytes_sent: int = 0
    messages_sent: int = 0
    node_bytes_read: int = 0
    node_bytes_written: int = 0
    in_call: None = None

    def attach(self, *progress: Any) -> None:
        """For native calls, of which there are none."""


Standing: Callable[[], Any] = getattr(library.built, "Standing", _Standing)
"""Where a group stands on this rank. ``sequence``: how many operations it has begun; ``in_call``: the signature of the
one that a thread does in a native call; and what the group's operations have sent, and read and written in the window.
"""


def watch_calls(group: type) -> None:
    """Tell the native module what sees this process's calls, and the class of groups."""
    if at_once is not None:
        library.built.watch_calls(globals(), vars(trace), active_modes, tracing_state, under_way, group)
