"""Errors that all ranks hear of: what may fail on some ranks only is done on all of them, or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..errors import AgreedError, UsageError

if TYPE_CHECKING:
    from .group import Group

T = TypeVar("T")


def together(group: Group, build: Callable[[], T]) -> T:
    """``build()`` on every rank; where it raises UsageError on any, all ranks raise AgreedError, with the ranks'
    numbers. Collective."""
    result: T | None = None
    message = b""
    try:
        result = build()
    except UsageError as error:
        message = str(error).encode()
    messages = group.gather_bytes(message, "set-up errors")
    if any(messages):
        texts = sorted({text.decode() for text in messages if text})
        ranks = [rank for rank, text in enumerate(messages) if text]
        where = "" if len(ranks) == group.size else f" (on ranks {', '.join(map(str, ranks))} of {group.size})"
        raise AgreedError("; ".join(texts) + where)
    return result  # type: ignore[return-value]
