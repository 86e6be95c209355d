"""Which implementation runs: the native module, the only importer of which is here, or torch where it was not built."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def _load() -> tuple[Any, str]:
    """The native module, or None and the reason it is missing."""
    try:
        import commlab._native as _native

        return _native, ""
    except ImportError as error:
        import_error = str(error)
    try:  # left by CMakeLists.txt where it could not build
        from commlab._native_missing import REASON

        return None, f"the native module was not built: {REASON}"
    except ImportError:
        return None, f"the native module cannot be imported: {import_error}"


# The native module, or None where there is none.
built, missing_reason = _load()
# What runs now: the same, or None while torch does the work.
active = built


def backend() -> str:
    """Which implementation runs and, if it is the slow one, why."""
    if active is not None:
        return f"native: {active.isa()}"
    return f"torch: {missing_reason if built is None else 'chosen by native.using()'}"


def backends() -> tuple[str, ...]:
    """Every implementation this build and this processor can run: the names that `using` takes."""
    return ("torch", *(built.isa_names() if built is not None else ()))


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run on one of `backends()` inside a `with` block. For tests and benchmarks: holds for the whole process."""
    global active
    if name not in backends():
        raise ValueError(f"native.using({name!r}): this build on this processor has {', '.join(backends())}")
    before, isa_before = active, built.isa() if built is not None else ""
    try:
        if name == "torch":
            active = None
        else:
            active = built
            built.set_isa(name)
        yield
    finally:
        active = before
        if built is not None:
            built.set_isa(isa_before)
