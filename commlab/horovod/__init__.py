"""Horovod's API on commlab: ``import commlab.horovod.torch as hvd``, and ``python -m commlab.horovod SCRIPT`` for
programs that can't be changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__version__ = "0.28.1"
"""The version of Horovod whose API this is, for programs that ask."""


def replace() -> None:
    """From now on ``import horovod.torch`` means this package."""
    from .alias import install

    install()


def run(
    func: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    np: int = 1,
    **options: Any,
) -> list[Any]:
    """Call ``func`` on ``np`` ranks of this machine, and return what each of them returned, in rank order; see
    :func:`.launch.run`."""
    from .launch import run as launched

    return launched(func, args, kwargs, np, **options)
