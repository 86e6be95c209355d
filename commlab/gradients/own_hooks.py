"""Hooks on the user's modules that belong to this process alone: no copy of a module has them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

_NOTHING: Callable[..., None] = nullcontext().__exit__
"""May be called with anything, and does nothing."""


class OwnHook:
    """A hook of a module that a copy of the module does not have: in a copy, and in a pickled module, a function of
    Python's own that does nothing stands in its place, so that a saved model can be loaded without commlab."""

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")
