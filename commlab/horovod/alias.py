"""``import horovod`` means this package, for programs that can't be changed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_HERE = __name__.rpartition(".")[0]
_MOVED = {
    "horovod.common.exceptions": f"{_HERE}.exceptions",
    "horovod.common.process_sets": f"{_HERE}.process_sets",
    "horovod.common.util": f"{_HERE}.queries",
    "horovod.common": _HERE,
    "horovod.torch.elastic.state": f"{_HERE}.torch.elastic",
    "horovod.torch.elastic.sampler": f"{_HERE}.torch.sampler",
    "horovod.torch.mpi_ops": f"{_HERE}.torch",
    "horovod.runner": f"{_HERE}.launch",
    "horovod.elastic": f"{_HERE}.torch.elastic",
}
"""Names that are elsewhere here."""

_REFUSED = ("tensorflow", "keras", "_keras", "mxnet", "spark", "ray", "data")


def refusal(name: str) -> str:
    """Why the module ``name`` of Horovod can't be imported; empty where it can."""
    part = name.split(".")[1] if "." in name else ""
    if part in _REFUSED:
        return (
            f"No module named {name!r}: commlab stands in for Horovod with PyTorch alone (horovod.torch, "
            f"horovod.torch.elastic, horovod.run); there is no {part} here"
        )
    return ""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self._own: dict[str, Any] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "horovod":
            return None
        reason = refusal(fullname)
        if reason:
            raise ImportError(reason, name=fullname)
        ours = _MOVED.get(fullname, fullname.replace("horovod", _HERE, 1))
        if importlib.util.find_spec(ours) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        ours = _MOVED.get(spec.name, spec.name.replace("horovod", _HERE, 1))
        module = importlib.import_module(ours)
        self._own[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has given the module the alias's spec; by its own one it finds its neighbours.
        assert module.__spec__ is not None
        module.__spec__ = self._own.pop(module.__spec__.name)


def install() -> None:
    """From now on ``horovod`` and what is below it is this package, also where Horovod is installed. A second call does
    nothing. ImportError where the real one is loaded already."""
    loaded = sys.modules.get("horovod")
    if loaded is not None and loaded is not sys.modules[_HERE]:
        raise ImportError("horovod is loaded already; call commlab.horovod.replace() before the first import of it")
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    sys.modules["horovod"] = sys.modules[_HERE]
