"""The optimizer's state whole again, on every rank, out of the pieces that ranks own: what an engine gives back when it
is closed, and what it plans anew from when other parameters are to be trained.

    rank 0  [ pieces ]   rank 1  [ pieces ]   rank 2  [ pieces ]      parameter by parameter, one allgather for each
    all     [ whole parameter: exp_avg ] [ exp_avg_sq ] ...           tensor of its state
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

from ..chunks import whole_at
from ..collectives.halves import gather_chunks_async
from ..errors import UsageError
from ..gradients.parameters import NamedParameter
from ..native.dtypes import DTYPES
from ..runtime.control import gather_bytes, raise_together
from ..runtime.group import Group
from .nested import pack, unpack
from .pieces import Piece, on_device, shaped, state, whole

Entries = Mapping[str, Sequence[Mapping[str, Any]]]
"""Pieces by the name of their parameter, as :func:`.pieces.state` has them."""

_TEXT = "text"


def give_back(
    group: Group,
    optimizer: torch.optim.Optimizer,
    pieces: Sequence[Piece],
    parameters: Sequence[NamedParameter],
    members: Sequence[Sequence[torch.Tensor]],
    *,
    sharded: bool,
) -> None:
    """The reverse of :func:`.pieces.rebind`: groups have whole parameters, ``members``, and the optimizer remembers
    what any rank's does of the pieces of ``parameters``. ``pieces``: what this rank has owned of ``parameters``;
    ``sharded``: whether others have owned the rest. Collective where they have. Cost: every rank is sent the whole
    state, and holds it."""
    if all(piece.tensor is piece.parameter.tensor for piece in pieces) and not sharded:
        return
    own = state(pieces, optimizer)["pieces"]
    for piece in pieces:
        optimizer.state.pop(piece.tensor, None)
    regroup(optimizer, members)
    if sharded:
        take_back(group, optimizer, own, parameters)
    else:
        known = ((item, own[item.name][0]["state"]) for item in parameters if item.name in own)
        _remember(optimizer, known)


def regroup(optimizer: torch.optim.Optimizer, members: Sequence[Sequence[torch.Tensor]]) -> None:
    """Let the optimizer's groups have ``members``."""
    for entry, tensors in zip(optimizer.param_groups, members, strict=True):
        entry["params"] = list(tensors)


def take_back(
    group: Group, optimizer: torch.optim.Optimizer, own: Entries, parameters: Sequence[NamedParameter]
) -> None:
    """Let the optimizer, whose groups have whole parameters, remember of ``parameters`` what ranks have of their
    pieces. ``own``: what this rank has. Where state was loaded on some ranks alone, it is dropped, and the optimizer
    refuses to step. Collective."""
    _remember(optimizer, whole_states(group, own, parameters))


def _remember(
    optimizer: torch.optim.Optimizer, states: Iterable[tuple[NamedParameter, Mapping[str, Any] | None]]
) -> None:
    entry_of = {id(tensor): entry for entry in optimizer.param_groups for tensor in entry["params"]}
    for item, values in states:
        if values is None:
            refuse_to_step(
                optimizer,
                f"of parameter {item.name!r} the ranks' optimizers remembered different things: state was loaded on "
                "some ranks and not on others. Load it on all of them",
            )
        elif values:
            piece = whole(item)
            found = {key: shaped(value, piece) for key, value in values.items()}
            optimizer.state[item.tensor] = on_device(found, piece, entry_of.get(id(item.tensor), {}))


def refuse_to_step(optimizer: torch.optim.Optimizer, why: str) -> None:
    """From now on every step of ``optimizer`` raises UsageError."""

    def refuse(*_: Any) -> None:
        raise UsageError(why)

    if hasattr(optimizer, "_optimizer_step_pre_hooks"):  # unless its class does not call torch's constructor
        optimizer.register_step_pre_hook(refuse)


def whole_states(
    group: Group, own: Entries, parameters: Sequence[NamedParameter]
) -> Iterator[tuple[NamedParameter, dict[str, Any] | None]]:
    """What the ranks' optimizers remember of each parameter, whole and on the CPU; empty where they remember nothing,
    None where they remember different things of its pieces: state was loaded on some ranks alone. ``own``: this rank's
    pieces. Collective, and so is every step of the iteration. UsageError on all ranks for state that is no number,
    text, tensor, or list of them."""
    everyones = [_decoded(record) for record in gather_bytes(group, _described(group, own), "optimizer's state")]
    for item in parameters:
        # (the piece's owner, its place among the owner's, what the owner says of it)
        found = [
            (rank, at, entry)
            for rank, described in enumerate(everyones)
            for at, entry in enumerate(described.get(item.name, ()))
        ]
        values: dict[str, Any] = {}
        kinds = {tuple((key, kind) for key, (kind, _) in entry["state"].items()) for _, _, entry in found}
        if len(kinds) > 1:
            yield item, None
            continue
        for key, kind in kinds.pop() if kinds else ():
            value = found[0][2]["state"][key][1]
            if kind == "numbers":
                value = torch.empty(item.tensor.numel(), dtype=getattr(torch, value), device="cpu")
                for rank, at, entry in found:
                    mine = own[item.name][at]["state"][key] if rank == group.rank else None
                    _give(group, value[entry["start"] : entry["stop"]], mine, rank, f"{key} of {item.name}")
            values[key] = value
        yield item, values


def _give(group: Group, target: torch.Tensor, mine: torch.Tensor | None, owner: int, name: str) -> None:
    """Write ``owner``'s numbers into ``target`` (1-D) on all ranks."""
    # Numbers of a dtype in which nothing travels travel as wider integers.
    flat = target if target.dtype in DTYPES else torch.empty(target.shape, dtype=torch.int32, device="cpu")
    if mine is not None:
        flat.copy_(mine.reshape(-1))
    gather_chunks_async(flat, whole_at(owner, flat.numel(), group.size), name, group=group).wait()
    if flat is not target:
        target.copy_(flat)


def _described(group: Group, own: Entries) -> bytes:
    """This rank's pieces without their numbers."""

    def kind_of(value: Any, entry: Mapping[str, Any]) -> tuple[str, Any]:
        if torch.is_tensor(value) and value.dim() and value.numel() == entry["stop"] - entry["start"]:
            return "numbers", str(value.dtype).removeprefix("torch.")
        return "value", value

    def build() -> bytes:
        described = {
            name: [
                {**entry, "state": {key: kind_of(value, entry) for key, value in entry["state"].items()}}
                for entry in entries
            ]
            for name, entries in own.items()
        }
        text, tensors = pack(described)
        tensors[_TEXT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return safetensors.torch.save(tensors)

    return raise_together(group, build)


def _decoded(record: bytes) -> dict[str, Any]:
    tensors = safetensors.torch.load(record)
    found: dict[str, Any] = unpack(bytes(tensors.pop(_TEXT).numpy()).decode(), tensors)
    return found
