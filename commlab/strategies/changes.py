"""What is trained may change in mid-training: layers are unfrozen and given to the optimizer, or frozen, renamed,
replaced. Every step looks whether something did; where it did, all ranks agree on what is trained from now on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch

from ..checkpoint.pieces import Piece
from ..errors import AgreedError, UsageError
from ..gradients.parameters import Named, name_parameters, parameters_by_name, require_numbers
from ..runtime.control import gather_bytes
from ..runtime.group import Group

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
        self._dicts: list[dict[str, Any]] = [module._parameters for module in modules]
        self._dicts += [module._modules for module in modules]
        self._names = list(chain.from_iterable(self._dicts))
        self._values = list(self._values_now())
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
        )

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


class Roster(NamedTuple):
    """What is trained from now on, as all ranks know it."""

    named: Named
    members: list[list[torch.Tensor]]
    """The whole parameters of each of the optimizer's groups."""


class Planned(NamedTuple):
    """What was trained so far, and how the optimizer has it on this rank."""

    named: Named
    members: Sequence[Sequence[torch.Tensor]]
    """As :attr:`Roster.members`."""
    pieces: Sequence[Piece]
    """What this rank's optimizer updates."""
    partial: bool
    """Whether the model has trainable parameters that another engine trains."""

    @property
    def rebound(self) -> bool:
        """Whether the optimizer's groups hold something else than ``members``: pieces, masters, stand-ins."""
        held = {id(piece.tensor) for piece in self.pieces}
        return any(id(item.tensor) not in held for item in self.named.trained)


def find_change(
    group: Group, structure: Structure, planned: Planned, model: torch.nn.Module
) -> Callable[[], Roster] | None:
    """None where other things have changed than what is trained; else how all ranks agree on it, which is collective.
    That raises UsageError on every rank for what can't be trained, and DisagreementError on every rank, with the
    parameters' names and the ranks, where what has changed is not the same on all of them."""
    listed = _Listed(structure, planned)
    what = error = ""
    try:
        named = _named(model, listed.members, planned)
        alike = _described(named) == _described(planned.named) and _same(listed.members, planned.members)
        if alike:
            return None
    except UsageError as refused:
        error = str(refused)
    changes = structure.described() or "the optimizer's groups have other members"
    what = _shortened(f"{error} ({changes})" if error else changes)

    def agree() -> Roster:
        # Ranks on which nothing has changed are about to do something else: the name tells them what they lack.
        record = json.dumps({"error": error, "removed": listed.removed, "kept": listed.kept}).encode()
        records = [json.loads(each) for each in gather_bytes(group, record, f"parameters: {what}")]
        _raise_alike([each["error"] for each in records])
        _require_removed_alike(records)
        gone = {name for each in records for name in each["removed"]}
        names = {id(item.tensor): item.name for item in (*planned.named.trained, *planned.named.frozen)}
        members = [[tensor for tensor in entry if names.get(id(tensor)) not in gone] for entry in listed.members]
        failure, found = "", Named([], [])
        try:
            found = _named(model, members, planned)
        except UsageError as refused:
            failure = str(refused)
        shown = json.dumps({"error": failure, "trained": _described(found)}).encode()
        everyones = [json.loads(each) for each in gather_bytes(group, shown, "parameters that are trained from now on")]
        _raise_alike([each["error"] for each in everyones])
        _require_alike([each["trained"] for each in everyones])
        return Roster(found, members)

    return agree


class _Listed:
    """What the optimizer's groups hold now, in whole parameters."""

    def __init__(self, structure: Structure, planned: Planned):
        self.members: list[list[torch.Tensor]] = []
        """Of each group."""
        self.removed: list[str] = []
        """Parameters that this rank updates, at least a piece of them, and that somebody has taken out of a group."""
        self.kept: list[str] = []
        """Parameters that this rank updates, at least a piece of them, and that are still there."""
        groups = structure.optimizer.param_groups
        if not planned.rebound:
            self.members = [list(entry["params"]) for entry in groups]
            return
        whole_of = {id(piece.tensor): piece.parameter for piece in planned.pieces}
        mine = {id(item.tensor): item.name for item in whole_of.values()}
        stand_ins = {id(tensor) for tensor in structure.members} - whole_of.keys()
        listed: list[dict[int, torch.Tensor]] = []
        for entry in groups:
            wholes = [
                whole_of[id(tensor)].tensor if id(tensor) in whole_of else tensor
                for tensor in entry["params"]
                if id(tensor) not in stand_ins
            ]
            listed.append({id(tensor): tensor for tensor in wholes})
        anywhere = set(chain.from_iterable(listed))
        for entry, there in zip(groups, listed, strict=True):
            old = next((at for at, before in enumerate(structure.groups) if before is entry), None)
            kept: dict[int, torch.Tensor] = {}
            for tensor in () if old is None else planned.members[old]:
                # What other ranks update, and what is frozen, is not listed here, and still a member.
                if id(tensor) in there or (id(tensor) not in mine and id(tensor) not in anywhere):
                    kept[id(tensor)] = tensor
            self.members.append(list((kept | there).values()))
        self.kept = [name for key, name in mine.items() if key in anywhere]
        self.removed = [name for key, name in mine.items() if key not in anywhere]


def _named(model: torch.nn.Module, members: Sequence[Sequence[torch.Tensor]], planned: Planned) -> Named:
    require_numbers(model)
    twice = [tensor for tensor, count in Counter(map(id, chain.from_iterable(members))).items() if count > 1]
    if twice:
        names = [name for name, tensor in parameters_by_name(model) if id(tensor) in twice]
        raise UsageError(f"{', '.join(map(repr, names))}: in two groups of the optimizer; leave it in one of them")
    named = name_parameters(model, members, partial=planned.partial)
    if not named.trained:
        raise UsageError("no parameter of the optimizer requires a gradient any more, so there is nothing to train")
    return named


def _described(named: Named) -> list[list[Any]]:
    """What ranks must agree on, of each parameter: name, shape, dtype, group, whether it is trained."""
    return [
        [item.name, list(item.tensor.shape), str(item.tensor.dtype).removeprefix("torch."), item.group, trained]
        for trained, items in ((True, named.trained), (False, named.frozen))
        for item in items
    ]


def _same(a: Sequence[Sequence[torch.Tensor]], b: Sequence[Sequence[torch.Tensor]]) -> bool:
    return [list(map(id, entry)) for entry in a] == [list(map(id, entry)) for entry in b]


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _raise_alike(errors: Sequence[str]) -> None:
    texts = sorted(set(filter(None, errors)))
    if texts:
        ranks = [rank for rank, text in enumerate(errors) if text]
        where = "" if len(ranks) == len(errors) else f" (on ranks {', '.join(map(str, ranks))} of {len(errors)})"
        raise AgreedError("; ".join(texts) + where)


def _require_removed_alike(records: Sequence[Mapping[str, Any]]) -> None:
    for rank, record in enumerate(records):
        for name in record["removed"]:
            keeps = [other for other, each in enumerate(records) if name in each["kept"]]
            if keeps:
                raise AgreedError(
                    f"{name!r} was taken out of the optimizer on rank {rank}, and is still there on rank"
                    f"{'s' * (len(keeps) > 1)} {', '.join(map(str, keeps))}; change the optimizer on all ranks alike"
                )


def _require_alike(everyones: Sequence[Sequence[Sequence[Any]]]) -> None:
    """AgreedError that names the first parameter on which ranks differ."""
    for rank, described in enumerate(everyones):
        if described != everyones[0]:
            first, other = ({each[0]: each[1:] for each in all_of} for all_of in (everyones[0], described))
            name = next((name for name in (*first, *other) if first.get(name) != other.get(name)), "")
            if not name:
                raise AgreedError(f"ranks 0 and {rank} have registered the same parameters in another order")
            shown = [
                "absent" if of is None else f"{of[1]}{of[0]} in group {of[2]}{'' if of[3] else ', frozen'}"
                for of in (first.get(name), other.get(name))
            ]
            raise AgreedError(
                f"parameter {name!r} is {shown[0]} on rank 0 and {shown[1]} on rank {rank}; all ranks must train the "
                "same parameters, in the same groups"
            )
