"""The look whether something else is to be trained than before, and whether anybody has written parameters. Every step
looks; what ranks do about a change is :mod:`.changes`'s business."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

from ..gradients.parameters import parameters_by_name

_trains = attrgetter("requires_grad")
_dtype = attrgetter("dtype")
_params = itemgetter("params")
_version = attrgetter("_version")


class Structure:
    """Remembers a model and its optimizer as they are, by identity: the modules, their parameters and names, what
    requires a gradient, the dtypes, and the optimizer's groups and their members. :meth:`same` costs some 0.2 us for
    each parameter and module."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self._model, self.optimizer = model, optimizer
        self._marks: list[int] = []
        self.look()

    def look(self) -> None:
        """Remember everything as it is now."""
        modules = list(self._model.modules())
        # TorchScript keeps its names in C++, and they are fixed.
        self._scripted = [module for module in modules if isinstance(module, torch.jit.ScriptModule)]
        plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self._dicts: list[dict[str, Any]] = [module._parameters for module in plain]
        self._dicts += [module._modules for module in plain]
        self._names = list(chain.from_iterable(self._dicts))
        self._values = list(self._values_now())
        self._scripted_values = self._scripted_values_now()
        self._shown = [(name, tensor) for name, tensor in parameters_by_name(self._model)]
        self.parameters: list[torch.nn.Parameter] = [tensor for _, tensor in self._shown]
        """All parameters of the model, trained or not."""
        self._settings = self._settings_now()
        self.groups: list[dict[str, Any]] = list(self.optimizer.param_groups)
        """The optimizer's groups."""
        self.members: list[torch.Tensor] = list(self._members_now())
        """What is in them, one after the other."""

    def _values_now(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._dicts))

    def _scripted_values_now(self) -> list[Any]:
        return [tensor for module in self._scripted for tensor in module._parameters.values()]

    def _settings_now(self) -> tuple[list[bool], list[torch.dtype]]:
        return list(map(_trains, self.parameters)), list(map(_dtype, self.parameters))

    def _members_now(self) -> Iterator[torch.Tensor]:
        return chain.from_iterable(entry["params"] for entry in self.optimizer.param_groups)

    def same(self) -> bool:
        """Whether nothing has changed."""
        groups = self.optimizer.param_groups
        return (
            self.same_structure()
            and self._settings == self._settings_now()
            and len(groups) == len(self.groups)
            and all(map(is_, groups, self.groups))
            and sum(map(len, map(_params, groups))) == len(self.members)
            and all(map(is_, self._members_now(), self.members))
        )

    def same_structure(self) -> bool:
        """Whether the model has the same parameters and modules, under the same names."""
        return (
            sum(map(len, self._dicts)) == len(self._values)
            and all(map(is_, self._values_now(), self._values))
            and list(chain.from_iterable(self._dicts)) == self._names
            and (not self._scripted or _are(self._scripted_values_now(), self._scripted_values))
        )

    def present(self) -> set[int]:
        """The id() of every parameter that the model has now."""
        return set(map(id, self._model.parameters()))

    def took_note(self) -> None:
        """The values of parameters, and the optimizer's state, are what all ranks have now."""
        self._marks = self._marks_now()

    def was_written(self) -> bool:
        """Whether anybody has written parameters, or put in another optimizer state, since :meth:`took_note`."""
        return self._marks_now() != self._marks

    def _marks_now(self) -> list[int]:
        return [*map(_version, self.parameters), id(self.optimizer.state), id(self.optimizer.param_groups)]

    def described(self) -> str:
        """What has changed, in words, parameters by name; empty where no parameter is concerned."""
        before = dict(self._shown)
        now = dict(parameters_by_name(self._model))
        names_before = {id(tensor): name for name, tensor in before.items()}
        changes = []
        for name, tensor in now.items():
            old = before.get(name)
            if old is None and id(tensor) in names_before:
                changes.append(f"{names_before[id(tensor)]!r} is called {name!r} now")
            elif old is None:
                changes.append(f"{name!r} is new")
            elif old is not tensor:
                changes.append(f"{name!r} is another tensor now")
        there = set(map(id, now.values()))
        lost = [name for name, tensor in before.items() if id(tensor) not in there and name not in now]
        changes += [f"{name!r} is gone" for name in lost]
        for (name, tensor), trained, dtype in zip(self._shown, *self._settings, strict=True):
            if id(tensor) in there and tensor.requires_grad != trained:
                changes.append(f"{name!r} is {'trainable' if tensor.requires_grad else 'frozen'} now")
            if tensor.dtype != dtype:
                changes.append(f"{name!r} is {str(tensor.dtype).removeprefix('torch.')} now")
        groups = self.optimizer.param_groups
        if len(groups) != len(self.groups):
            changes.append(f"the optimizer has {len(groups)} groups, and had {len(self.groups)}")
        return ", ".join(changes)


def _are(now: list[Any], before: list[Any]) -> bool:
    """Whether these are the same objects."""
    return len(now) == len(before) and all(map(is_, now, before))
