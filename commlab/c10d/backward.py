"""Futures that DDP's reducer asks for while backward goes on, and waits for at the end of it.

The reducer, which is C++, asks for the future of a bucket as soon as the bucket is on its way. Where no core is free
nobody completes a future later, so it would be waited for before backward goes on. Instead the engine of autograd is
told to call back when backward ends, and that call waits for all buckets together.

Why nobody waits for ever. The reducer launches the last bucket and then, in the same hook of the same backward, tells
the engine to call it at the end; there it waits for the futures. The engine makes these calls in order, and ours was
asked for when the future was, so before. Two other ways lead to the reducer's wait, and both are told apart by
:func:`asked_in_backward`: a static graph's first backward launches its buckets in such a call itself, when no node of
the graph is at work; and a backward within a backward (a checkpoint that is reentrant) ends before the outer one. A
future that is asked for in those is complete when it is given, and so are all that were put off before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.graph

_RUN: Any = getattr(getattr(torch.autograd.graph, "_engine_run_backward", None), "__code__", None)
"""What every backward() runs, and what C++ returns to."""
_node_at_work: Any = getattr(torch._C, "_current_autograd_node", None)


def asked_in_backward(frame: Any) -> bool:
    """Whether C++ asks, in a hook of a gradient that has been accumulated, in a backward that is in no other one.
    ``frame``: who has called, as Python sees it: hooks that are written in Python are functions of their own."""
    if frame is None or frame.f_code is not _RUN or _node_at_work is None:
        return False
    if type(_node_at_work()).__name__ != "AccumulateGrad":
        return False
    while (frame := frame.f_back) is not None:
        if frame.f_code is _RUN:
            return False
    return True


class AtEnd:
    """What is put off to the end of a backward, of one group."""

    def __init__(self) -> None:
        self._put_off: list[Callable[[], None]] = []

    def put_off(self, complete: Callable[[], None], frame: Any) -> bool:
        """Whether ``complete()`` will be called when this backward ends; not where :func:`asked_in_backward` does not
        hold. It raises nothing."""
        if not asked_in_backward(frame):
            return False
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self.complete_all)
        self._put_off.append(complete)
        return True

    def complete_all(self) -> None:
        """Complete what was put off so far, in order."""
        put_off, self._put_off = self._put_off, []
        for complete in put_off:
            complete()


def caller_of(depth: int) -> Any:
    """The frame ``depth`` calls above the caller; None where C++ has called outside of every Python function."""
    try:
        return sys._getframe(depth + 1)
    except ValueError:
        return None
