"""Optimizer state by parameter name and range: the one form in which it is sharded, saved and loaded.

A piece is a range of one flattened parameter together with the tensor that the optimizer updates for that range.
Strategies without sharding have one piece per parameter, the whole of it; so state saved under one strategy and number
of ranks loads under any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch

from ..chunks import Range
from ..errors import UsageError
from ..gradients.parameters import NamedParameter, plain_name


class Piece(NamedTuple):
    """Elements ``start .. stop - 1`` of ``parameter`` (flattened), updated through ``tensor``."""

    parameter: NamedParameter
    start: int
    stop: int
    tensor: torch.Tensor

    @property
    def text(self) -> str:
        """The piece, for messages."""
        return f"{self.parameter.name!r} [{self.start}:{self.stop}]"


MASTER = "master"
"""The name under which the fp32 master is saved, beside the optimizer's state, where a piece is updated through one."""


def parameter_of(piece: Piece) -> torch.Tensor:
    """The piece's range of the parameter itself, in the shape of ``piece.tensor``."""
    whole = piece.parameter.tensor.detach()
    if piece.tensor.shape == whole.shape:
        return whole
    return whole.view(-1)[piece.start : piece.stop].view(piece.tensor.shape)


def _is_master(piece: Piece) -> bool:
    return piece.tensor.dtype != piece.parameter.tensor.dtype


def rebind(
    optimizer: torch.optim.Optimizer, pieces: Sequence[Piece], parameters: Iterable[NamedParameter] | None = None
) -> None:
    """Let the user's own optimizer update ``pieces`` instead of whole parameters; its groups, hyper-parameters and
    schedulers stay, and state that it has already of ``parameters`` is cut as the parameters are. What it remembers of
    others, which are frozen, stays whole; None: of all that it remembers only pieces stay.
    :func:`commlab.checkpoint.whole.give_back` is the reverse."""
    cut = list(optimizer.state) if parameters is None else [item.tensor for item in parameters]
    before = {id(tensor): dict(optimizer.state.pop(tensor, {})) for tensor in cut}
    members: list[list[torch.Tensor]] = [[] for _ in optimizer.param_groups]
    for piece in sorted(pieces, key=lambda piece: (piece.parameter.index, piece.start)):
        members[piece.parameter.group].append(piece.tensor)
        whole = piece.parameter.tensor
        old = before.get(id(whole), {})
        old.pop(MASTER, None)  # whoever made the piece's tensor has taken it
        if old:
            optimizer.state[piece.tensor] = {
                key: shaped(_cut(value, whole.shape, piece.start, piece.stop).clone(), piece)
                if torch.is_tensor(value)
                else value
                for key, value in old.items()
            }
    for entry, tensors in zip(optimizer.param_groups, members, strict=True):
        entry["params"] = tensors


def _cut(value: torch.Tensor, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
    """The range of a state tensor that belongs to a piece; a tensor that is not shaped like the parameter (a step
    counter) belongs to all pieces."""
    return value.reshape(-1)[start:stop] if value.shape == shape and value.dim() else value


def state(
    pieces: Iterable[Piece], optimizer: torch.optim.Optimizer, frozen: Iterable[NamedParameter] = ()
) -> dict[str, Any]:
    """What this rank's optimizer remembers: ``{"optimizer": class, "groups": [hyper-parameters], "pieces": {name:
    [{"start", "stop", "numel", "shape", "group", "dtype", "state"}]}}``, and where the optimizer remembers something of
    ``frozen`` parameters also ``"frozen"``, like ``"pieces"``. Tensors are not copied."""
    remembered = [whole(item) for item in frozen if optimizer.state.get(item.tensor)]
    saved = {**about(optimizer), "pieces": _entries(pieces, optimizer)}
    if remembered:
        saved["frozen"] = _entries(remembered, optimizer)
    return saved


def whole(item: NamedParameter) -> Piece:
    """All of a parameter, updated in place."""
    return Piece(item, 0, item.tensor.numel(), item.tensor)


def _entries(pieces: Iterable[Piece], optimizer: torch.optim.Optimizer) -> dict[str, list[dict[str, Any]]]:
    saved: dict[str, list[dict[str, Any]]] = {}
    for piece in pieces:
        entry: dict[str, Any] = {"start": piece.start, "stop": piece.stop, **described(piece.parameter)}
        entry["dtype"] = str(piece.tensor.dtype)
        values = optimizer.state.get(piece.tensor, {})
        entry["state"] = {
            key: _cut(value, piece.tensor.shape, 0, piece.stop - piece.start) if torch.is_tensor(value) else value
            for key, value in values.items()
        }
        if _is_master(piece):
            entry["state"][MASTER] = piece.tensor.view(-1)
        saved.setdefault(piece.parameter.name, []).append(entry)
    return saved


def about(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is saved of the optimizer itself: its class, and the hyper-parameters of its groups."""
    return {"optimizer": type(optimizer).__name__, "groups": groups_of(optimizer)}


def described(item: NamedParameter) -> dict[str, Any]:
    """What is saved of a parameter beside its values and its state."""
    return {"numel": item.tensor.numel(), "shape": list(item.tensor.shape), "group": item.group}


def groups_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The hyper-parameters of each of the optimizer's groups."""
    return [{key: value for key, value in entry.items() if key != "params"} for entry in optimizer.param_groups]


def load(
    pieces: Iterable[Piece],
    optimizer: torch.optim.Optimizer,
    states: Sequence[dict[str, Any]],
    frozen: Iterable[NamedParameter] = (),
) -> None:
    """The reverse of :func:`state`, from the states of any number of ranks. What was saved of a ``frozen`` parameter is
    taken, too; it may be nothing."""
    collected = collect(pieces, optimizer, states)
    known = [whole(item) for item in frozen if _saved_of(item.name, states)]
    collected += collect(known, optimizer, states)
    load_groups(optimizer, states)
    for piece, found in collected:
        master = found.pop(MASTER, None)
        if _is_master(piece):
            piece.tensor.copy_(parameter_of(piece) if master is None else master.view(piece.tensor.shape))
        optimizer.state[piece.tensor] = on_device(found, piece, optimizer.param_groups[piece.parameter.group])


def on_device(found: dict[str, Any], piece: Piece, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a piece where the optimizer wants it: a fused one wants its step counter, too, on the tensor's
    device. ``entry``: the piece's group in the optimizer."""
    if not (entry.get("fused") or entry.get("capturable")):
        return found
    return {key: value.to(piece.tensor.device) if torch.is_tensor(value) else value for key, value in found.items()}


def collect(
    pieces: Iterable[Piece], optimizer: torch.optim.Optimizer, states: Sequence[dict[str, Any]]
) -> list[tuple[Piece, dict[str, Any]]]:
    """What the optimizer is to remember of each piece, out of any ranks' ``states``. Changes nothing: an error must
    leave the optimizer as it was."""
    if not states:
        raise UsageError("load_state_dict() needs at least one part")
    _require_same_class(optimizer, states[0])
    if len(states[0]["groups"]) != len(optimizer.param_groups):
        raise UsageError(
            f"the saved optimizer has {len(states[0]['groups'])} groups, this one {len(optimizer.param_groups)}"
        )
    # A parameter without numbers has a state too, which nobody saved.
    return [(piece, _collect(piece, states)) for piece in pieces if piece.stop > piece.start]


def _require_same_class(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """UsageError where the state is one that ``optimizer`` can't go on from: of another class, with other
    hyper-parameters (those of Adam and AdamW are alike). States of commlab 0.1 do not tell their class."""
    saved_class, own_class = saved.get("optimizer"), type(optimizer).__name__
    lacking = {key for entry in saved["groups"] for key in getattr(optimizer, "defaults", {}).keys() - entry.keys()}
    if saved_class not in (None, own_class) and lacking:
        raise UsageError(
            f"the saved state is of an optimizer {saved_class}, and this one is {own_class}, whose "
            f"{', '.join(sorted(lacking))} were not saved; give the optimizer that was saved, or load the model's "
            "parameters alone"
        )


def load_groups(optimizer: torch.optim.Optimizer, states: Sequence[dict[str, Any]]) -> None:
    """The optimizer's hyper-parameters become those that were saved."""
    for entry, saved in zip(optimizer.param_groups, states[0]["groups"], strict=True):
        entry.update({key: deepcopy(value) for key, value in saved.items() if key != "params"})


def _saved_of(name: str, states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What any rank has saved of the parameter ``name``, trained or frozen, compiled or not."""
    return [
        entry
        for state in states
        for saved in (state["pieces"], state.get("frozen", {}))
        for saved_name, entries in saved.items()
        if saved_name == name or plain_name(saved_name) == name
        for entry in entries
    ]


def _collect(piece: Piece, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    name, wanted = piece.parameter.name, Range(piece.start, piece.stop)
    saved = _saved_of(name, states)
    if saved and saved[0]["numel"] != piece.parameter.tensor.numel():
        raise UsageError(
            f"parameter {name!r}: saved with {saved[0]['numel']} numbers, the model has "
            f"{piece.parameter.tensor.numel()}"
        )
    for key, what in (("shape", "with shape"), ("group", "in the optimizer's group")):
        mine = described(piece.parameter)[key]
        if saved and saved[0].get(key, mine) != mine:
            raise UsageError(
                f"parameter {name!r}: saved {what} {saved[0][key]}, and here it is {mine}; make model and optimizer as "
                "they were saved"
            )
    result: dict[str, Any] = {}
    # Ranks that do not shard all save the whole parameter; its numbers are taken once.
    covered = wanted.start
    for entry in sorted(saved, key=lambda entry: int(entry["start"])):
        here = Range(entry["start"], entry["stop"])
        common = here.intersect(Range(covered, wanted.stop))
        if not common.numel or common.start > covered:
            continue
        covered = common.stop
        for key, value in entry["state"].items():
            if not torch.is_tensor(value) or value.dim() == 0 or value.numel() != here.numel:
                result[key] = value.clone() if torch.is_tensor(value) else value
                continue
            if key not in result:
                # What has the dtype of the updated tensor keeps having it, as under torch's load_state_dict().
                follows = str(value.dtype) == entry.get("dtype") and key != MASTER
                dtype = piece.tensor.dtype if follows else value.dtype
                result[key] = torch.empty(wanted.numel, dtype=dtype, device=value.device)
            result[key][common.start - wanted.start : common.stop - wanted.start] = value[
                common.start - here.start : common.stop - here.start
            ]
    if covered != wanted.stop:
        raise UsageError(
            f"parameter {name!r}: this rank updates its numbers "
            f"{wanted.start}..{wanted.stop - 1}, and number {covered} has no saved state; "
            "load the parts of all ranks that saved"
        )
    return {key: shaped(value, piece) for key, value in result.items()}


def shaped(value: Any, piece: Piece) -> Any:
    """State of a whole parameter has the parameter's shape, and its strides: torch's fused optimizers walk both as
    plain memory."""
    if torch.is_tensor(value) and value.dim() == 1 and value.numel() == piece.tensor.numel():
        return torch.empty_like(piece.tensor, dtype=value.dtype).copy_(value.view(piece.tensor.shape))
    return value
