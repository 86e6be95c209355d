"""torch.compile and commlab: what the user compiles stops before each of commlab's functions, and goes on behind it.

Their numbers come from other processes, through memory and sockets that no graph knows. torch's tracer would follow
them into their Python nevertheless, and freeze into the graph what was so at the first call: the place of an operation
in its order, the addresses of buffers. So its list of folders to leave alone gets commlab's, as soon as it is there:
it is imported by the first use of torch.compile, which takes seconds, and not before.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

_RULES = "torch._dynamo.trace_rules"


def leave_alone() -> None:
    """Let torch.compile break its graphs at commlab's functions, from now on or from when it is first used."""
    if _RULES in sys.modules:
        _add_folder(sys.modules[_RULES])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def uncompiled(call: Callable[[], T]) -> T:
    """``call()``, of which nothing is compiled, whatever is compiled around it: an optimizer's step, of which torch
    would change a hyper-parameter (``capturable``) on the ranks that own something. Cost: about 1 us."""
    from torch._C._dynamo import eval_frame

    before = eval_frame.set_eval_frame(None)
    try:
        return call()
    finally:
        eval_frame.set_eval_frame(before)


def _add_folder(rules: ModuleType) -> None:
    try:
        rules.add(__name__.partition(".")[0])
    except Exception as error:
        # Whoever imports torch must not be stopped by this.
        warnings.warn(
            "torch.compile can't be told to leave commlab's functions alone "
            f"({type(error).__name__}: {error}): call them outside of compiled functions only",
            stacklevel=2,
        )


class _WhenImported(MetaPathFinder):
    """Waits for the import of the rules, and takes part in no other."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _RULES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndAdd(spec.loader)
        return spec


class _AndAdd(Loader):
    """Stands in for the loader of the rules while they are loaded, and adds commlab's folder when they are there."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
        self._loader.exec_module(module)
        _add_folder(module)
