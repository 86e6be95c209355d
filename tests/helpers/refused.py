"""What a call that must fail says."""

from __future__ import annotations

from collections.abc import Callable


def message(call: Callable[[], object]) -> str:
    """The text of the error that ``call`` raises; AssertionError where nothing is raised."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError("nothing was raised")
