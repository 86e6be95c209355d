"""Pulls that travel during the next forward: each is waited for where forward first needs it.

    servers    h.0 h.1 h.2 ...                         values leave in forward order
    worker     step() | wte | h.0 | h.1 | h.2 ...      the next forward begins at once, and waits for one at a time

Which module reads which parameter is found out by watching one forward pass: a parameter is waited for when a module
begins that has it; where no such module was ever called (its weights are read by the module above, as in
torch.nn.MultiheadAttention), when the nearest module above begins that was called. P. Jayarajan et al., "Priority-based
parameter propagation for distributed DNN training", MLSys 2019.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .. import trace
from ..gradients.own_hooks import OwnHook
from ..gradients.parameters import parameters_by_name
from ..ps.placement import UNIT_BYTES
from ..ps.store import ParameterServer
from ..runtime.handle import Handle
from .flat import FlatParameters


class Unit(NamedTuple):
    """Parameters that are pulled and waited for together: one big one, or small ones that adjoin."""

    names: tuple[str, ...]
    flat: torch.Tensor
    """The parameters themselves, side by side."""

    @property
    def text(self) -> str:
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} .. {self.names[-1]}"


class Pulls:
    """Pulls of the parameters in ``flats``. ``waited(seconds)`` is called after each wait inside forward. Hooks stay on
    the model until :meth:`close`."""

    def __init__(
        self,
        model: torch.nn.Module,
        store: ParameterServer,
        flats: Sequence[FlatParameters],
        waited: Callable[[float], None],
    ):
        self._model, self._store, self._waited = model, store, waited
        self.units = [unit for each in reversed(flats) for unit in _units(each)]
        """All parameters, in the order in which forward needs them."""
        self._under_way: dict[int, Handle] = {}
        self._called: set[torch.nn.Module] = set()
        """Modules whose forward has begun, while that is being watched."""
        self._needs: dict[torch.nn.Module, list[int]] | None = None
        """The units that each module waits for; None until a forward pass has been watched."""
        self._unguarded: set[int] = set()
        """Units that no module is known to wait for."""
        self._hooks: list[Any] = [
            module.register_forward_pre_hook(OwnHook(self._begins))
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks: the module above waits for it
        ]
        saving = OwnHook(lambda *_: self.wait_for_all())
        self._hooks.append(model.register_state_dict_pre_hook(saving))

    def ask(self, *, exact: bool = False) -> None:
        """Ask for all parameters as of now. ``exact``: as they are on the servers, whatever the wire."""
        self.wait_for_all()  # for those that no forward has needed: two pulls must not write to one tensor
        if self._needs is None and self._called:
            self._watch_ends()
        for at, unit in enumerate(self.units):
            self._under_way[at] = self._store.pull_flat(unit.names, unit.flat, exact=exact)
        self._store.poll()  # small units wait for one another

    def end_step(self) -> None:
        """Wait for the parameters that no module is known to wait for: all of them, until a forward pass has been
        watched."""
        if self._needs is None:
            self.wait_for_all()
        for at in self._unguarded:
            self._under_way.pop(at).wait()

    def wait_for_all(self) -> None:
        """Wait for every pull that is under way."""
        for at in list(self._under_way):
            self._under_way.pop(at).wait()

    def on_their_way(self, names: Iterable[str]) -> list[str]:
        """The parameters among ``names`` that nobody has waited for."""
        coming = {name for at in self._under_way for name in self.units[at].names}
        return [name for name in names if name in coming]

    def close(self) -> None:
        """Wait for every pull, and take the hooks off the model."""
        self.wait_for_all()
        for hook in self._hooks:
            hook.remove()

    def _begins(self, module: torch.nn.Module, _: Any) -> None:
        if self._needs is None:
            self._called.add(module)
        elif self._under_way:
            self._store.poll()
            for at in self._needs.get(module, ()):
                if at in self._under_way:
                    self._wait(at)

    def _wait(self, at: int) -> None:
        handle = self._under_way.pop(at)
        if handle.finished:
            handle.wait()
            return
        started_s = time.perf_counter()
        with trace.span(f"wait for {self.units[at].text}"):
            handle.wait()
        self._waited(time.perf_counter() - started_s)

    def _watch_ends(self) -> None:
        unit_of = {name: at for at, unit in enumerate(self.units) for name in unit.names}
        first_name = {tensor: name for name, tensor in parameters_by_name(self._model)}
        modules = dict(self._model.named_modules(remove_duplicate=False))
        needs: dict[torch.nn.Module, set[int]] = {}
        for name, tensor in self._model.named_parameters(remove_duplicate=False):
            at = unit_of.get(first_name[tensor])
            if at is None:
                continue
            path = name.rpartition(".")[0]
            while path and modules[path] not in self._called:
                path = path.rpartition(".")[0]
            if modules[path] in self._called:
                needs.setdefault(modules[path], set()).add(at)
            else:
                self._unguarded.add(at)
        self._needs = {module: sorted(units) for module, units in needs.items()}


def _units(parameters: FlatParameters) -> list[Unit]:
    """The parameters of one bucket, small ones gathered until they fill a unit."""
    bucket, flat = parameters.bucket, parameters.flat
    units, first = [], 0
    for last, (_, extent) in enumerate(zip(bucket.parameters, bucket.ranges, strict=True)):
        start = bucket.ranges[first].start
        full = (extent.stop - start) * flat.element_size() >= UNIT_BYTES
        if full or last == len(bucket.parameters) - 1:
            names = tuple(member.name for member in bucket.parameters[first : last + 1])
            units.append(Unit(names, flat[start : extent.stop]))
            first = last + 1
    return units
