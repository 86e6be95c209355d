"""Parameter servers under mpirun: what a test of one must do at its end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from commlab.ps.store import ParameterServer

Test = TypeVar("Test", bound=Callable[..., None])


def closing_stores(test: Test) -> Test:
    """A worker whose assertion has failed must not leave its servers serving: the verdict is collective."""

    @functools.wraps(test)
    def wrapped(*args: Any, **options: Any) -> None:
        made: list[ParameterServer] = []
        build_store = ParameterServer.__init__

        def remembered(self: ParameterServer, *args: Any, **options: Any) -> None:
            made.append(self)
            build_store(self, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ParameterServer, "__init__", remembered)
            try:
                test(*args, **options)
            finally:
                for store in made:
                    if getattr(store, "_client", None) is not None:
                        store.close()

    return wrapped  # type: ignore[return-value]
