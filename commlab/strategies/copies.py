"""What every rank has a copy of: given from rank 0 at the start, and compared from then on.

start    parameters, buffers, the optimizer's state and hyper-parameters become rank 0's, where a digest differs
later    every K steps, when a rank has written parameters between the steps, and in settle(): a digest of the copies
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from hashlib import blake2b, sha256
from typing import Any

import torch

from ..checkpoint.nested import pack, unpack
from ..collectives.operations import broadcast
from ..errors import DisagreementError, UsageError
from ..gradients.parameters import buffers_by_name, parameters_by_name, unexpanded
from ..native.dtypes import DTYPES
from ..runtime.control import exchange_records, gather_bytes, raise_together, ranks_of, sides_of
from ..runtime.group import Group
from ..runtime.raw import bytes_of, fingerprint, layout_of, require_dense, write_bytes
from .hypers import NOT_COMPARED, text_of
from .options import Options

_SHOWN = 5
"""The most tensors that an error lists."""

# Rank 0's become everybody's.


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers, by name. UsageError for one that is no dense tensor."""
    tensors = [(name, tensor.detach()) for name, tensor in parameters_by_name(model)]
    tensors += buffers_by_name(model)
    for name, tensor in tensors:
        require_dense(name, tensor)
    return tensors


def copy_from_rank_0(group: Group, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Overwrite ``tensors``, of any dtype, with rank 0's, bit for bit. Ranks that built the model from one seed have
    them already: a digest tells, and then nothing is sent. Collective."""
    if group.size == 1 or _alike(group, _digest(tensors), "model digest"):
        return
    for name, tensor in tensors:
        _give(group, name, tensor)


def copy_bytes_from_rank_0(group: Group, tensors: list[tuple[str, torch.Tensor]], name: str) -> None:
    """Overwrite ``tensors`` with rank 0's, in one broadcast: for many small ones, of equal layouts on all ranks.
    Collective."""
    if not tensors:
        return
    parts = [bytes_of(tensor).cpu() for _, tensor in tensors]
    flat = _padded(torch.cat(parts))
    broadcast(flat, 0, name=name, group=group)
    numbers, start = flat.view(torch.uint8), 0
    for (_, tensor), part in zip(tensors, parts, strict=True):
        if group.rank:
            write_bytes(tensor, numbers[start : start + part.numel()])
        start += part.numel()


def _give(group: Group, name: str, tensor: torch.Tensor) -> None:
    tensor = unexpanded(tensor)
    # The shape in the name: a broadcast itself compares numbers of numbers only. How a tensor lies in memory is each
    # rank's own affair.
    name = f"{name} {list(tensor.shape)}"
    if tensor.dtype in DTYPES and tensor.layout is torch.strided:
        broadcast(tensor, 0, name=name, group=group)
        return
    own = bytes_of(tensor).cpu()
    flat = _padded(own)
    broadcast(flat, 0, name=f"{name} {layout_of(tensor)}", group=group)
    if group.rank:
        write_bytes(tensor, flat.view(torch.uint8)[: own.numel()])


def _padded(data: torch.Tensor) -> torch.Tensor:
    """A copy of bytes as int64[:], which every collective takes; zeros behind the end."""
    flat = torch.zeros(-(-data.numel() // 8), dtype=torch.int64, device="cpu")
    flat.view(torch.uint8)[: data.numel()] = data
    return flat


def _digest(tensors: Iterable[tuple[str, torch.Tensor]], text: str = "") -> bytes:
    digest = sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {layout_of(tensor)}".encode())
        digest.update(bytes_of(tensor).cpu().numpy().data)
    return digest.digest()


def _alike(group: Group, digest: bytes, name: str) -> bool:
    return len(set(exchange_records(group, digest, name))) == 1


def start_from_rank_0(
    group: Group, model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: Options, strategy: str = ""
) -> None:
    """Every rank gets rank 0's parameters, buffers, optimizer state and hyper-parameters: also where rank 0 alone has
    loaded a checkpoint. Collective. Cost: a digest of all that, and where ranks are alike nothing else.

    DisagreementError where ranks were given different options, or optimizers with other parameters in their groups.
    UsageError, on all ranks, for optimizer state that can't be described (an object of the user's own).
    """
    if group.size == 1:
        return
    _require_same_options(group, options, strategy)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    tensors, (text, state) = raise_together(group, lambda: (tensors_of(model), pack(_described(optimizer, names))))
    _require_same_structure(group, json.dumps([[type(optimizer).__qualname__], *_members(optimizer, names)]))
    if _alike(group, _digest([*tensors, *state.items()], text), "model digest"):
        return
    for name, tensor in tensors:
        _give(group, name, tensor)
    _take(optimizer, names, *_state_of_rank_0(group, text, state))


def _require_same_options(group: Group, options: Options, strategy: str) -> None:
    fields = {
        "strategy": strategy,
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)},
    }
    texts = {name: repr(value) for name, value in fields.items()}
    everyones = _where_they_differ(group, json.dumps(texts), "options")
    for name in texts if everyones else ():
        values = [each[name] for each in everyones]
        if len(set(values)) > 1:
            raise DisagreementError(
                f"rank {group.rank}: commlab.strategy() was given different options: {name}, {sides_of(values)}; "
                "give every rank the same"
            )


def _require_same_structure(group: Group, structure: str) -> None:
    everyones = _where_they_differ(group, structure, "parameter groups")
    if not everyones:
        return
    if len({len(each) for each in everyones}) > 1:
        what = f"the number of parameter groups: {sides_of([str(len(each) - 1) for each in everyones])}"
    else:
        at = next(at for at in range(len(everyones[0])) if len({json.dumps(each[at]) for each in everyones}) > 1)
        first = next(
            place for place in range(10**9) if len({tuple(each[at][place : place + 1]) for each in everyones}) > 1
        )
        sides = sides_of([repr(each[at][first]) if first < len(each[at]) else "none" for each in everyones])
        what = f"the optimizer's class: {sides}" if at == 0 else f"entry {first} of parameter group {at - 1}: {sides}"
    raise DisagreementError(
        f"rank {group.rank}: ranks have different optimizers: {what}; make the optimizer alike on every rank"
    )


def _where_they_differ(group: Group, text: str, name: str, local_ranks: Sequence[int] | None = None) -> list[Any]:
    """All ranks' ``text`` (JSON), where they differ; else nothing. ``local_ranks``: of each rank, where only ranks with
    the same one are to be alike."""
    digests = exchange_records(group, blake2b(text.encode(), digest_size=8).digest(), f"digest of {name}")
    if len(set(zip(local_ranks or [0] * group.size, digests, strict=True))) == len(set(local_ranks or [0])):
        return []
    return [json.loads(each) for each in gather_bytes(group, text.encode(), name)]


def _members(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> list[list[str]]:
    """Of each group: the names of its parameters, and the hyper-parameters that have no plain value."""
    return [
        [
            *(names.get(id(tensor), "?") for tensor in entry["params"]),
            *(f"{key}={text_of(value)}" for key, value in sorted(entry.items()) if not _is_given(key, value)),
        ]
        for entry in optimizer.param_groups
    ]


def _is_given(key: str, value: Any) -> bool:
    return key in NOT_COMPARED or _is_plain(value)


# The optimizer's state, between ranks that may have none: described by the names of parameters, never pickled.


def _described(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Any]:
    """Hyper-parameters and state as :func:`commlab.checkpoint.nested.pack` takes them. A hyper-parameter that has no
    plain value (a function) stays each rank's own, and is compared by its name."""
    groups = [
        {key: value for key, value in entry.items() if key not in NOT_COMPARED and _is_plain(value)}
        for entry in optimizer.param_groups
    ]
    state = []
    for owner, found in optimizer.state.items():
        name = names.get(id(owner)) if torch.is_tensor(owner) else owner
        if not isinstance(name, str):
            raise UsageError(
                f"optimizer {type(optimizer).__name__} remembers something of {type(owner).__name__} {owner!r:.60}, "
                "which is no parameter of the model and cannot be given to the other ranks; hand over an optimizer "
                "without it"
            )
        for key, value in found.items() if isinstance(found, dict) else [("state", found)]:
            if not _is_plain(value):
                raise UsageError(
                    f"optimizer {type(optimizer).__name__} remembers {key!r} of {name!r} as a {type(value).__name__}, "
                    "which cannot be given to the other ranks: state may be tensors, numbers, text, bytes, None, and "
                    "lists, tuples and dicts of them. Hand over an optimizer without state, or with such state alone"
                )
        state.append((torch.is_tensor(owner), name, found))
    return {"groups": groups, "state": state}


def _is_plain(value: Any) -> bool:
    try:
        pack(value)
    except UsageError:
        return False
    return True


def _state_of_rank_0(group: Group, text: str, tensors: dict[str, torch.Tensor]) -> tuple[str, dict[str, torch.Tensor]]:
    about = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}
    sent = json.dumps([text, about]).encode() if group.rank == 0 else b""
    text, about = json.loads(gather_bytes(group, sent, "state of the optimizer")[0])
    given: dict[str, torch.Tensor] = {}
    for name, (dtype, shape) in about.items():
        given[name] = (
            tensors[name] if group.rank == 0 else torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        )
        _give(group, f"optimizer state {name}", given[name])
    return text, given


def _take(optimizer: torch.optim.Optimizer, names: dict[int, str], text: str, tensors: dict[str, torch.Tensor]) -> None:
    """Rank 0's state and hyper-parameters become those of ``optimizer``; on rank 0 they are."""
    given = unpack(text, tensors)
    owner_of = {names[id(p)]: (p, entry) for entry in optimizer.param_groups for p in entry["params"] if id(p) in names}
    for entry, plain in zip(optimizer.param_groups, given["groups"], strict=True):
        for key in [key for key, value in entry.items() if key not in (*NOT_COMPARED, *plain) and _is_plain(value)]:
            del entry[key]
        entry.update({key: value for key, value in plain.items() if not _same_value(entry.get(key), value)})
    state = {}
    for of_parameter, name, found in given["state"]:
        if not of_parameter:
            state[name] = found
            continue
        parameter, entry = owner_of[name]
        on_device = bool(entry.get("fused") or entry.get("capturable"))
        state[parameter] = {key: _placed(value, key, parameter, on_device) for key, value in found.items()}
    optimizer.state.clear()
    optimizer.state.update(state)


def _same_value(own: Any, other: Any) -> bool:
    return type(own) is type(other) and not torch.is_tensor(own) and bool(own == other)


def _placed(value: Any, key: Any, parameter: torch.Tensor, on_device: bool) -> Any:
    """A tensor of a parameter's state as an optimizer makes it: where the parameter is, but for a step counter, and
    with the parameter's strides, because torch's fused optimizers walk both as plain memory."""
    if not torch.is_tensor(value):
        return value
    if value.shape == parameter.shape and value.dim():
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.clone() if key == "step" and not on_device else value.to(parameter.device, copy=True)


# Copies that must be equal.


_REMEDY = (
    "Something wrote them on some ranks alone: load checkpoints before commlab.strategy(), which gives rank 0's to "
    "all, or on every rank; change parameters in engine.update_parameters()"
)


def require_alike(
    group: Group,
    steps: int,
    copies: Iterable[tuple[str, Any]],
    *,
    local_ranks: Sequence[int] | None = None,
    remedy: str = _REMEDY,
) -> None:
    """DisagreementError, on all ranks, where any of ``copies`` (tensors, and what else optimizers remember, by name)
    differs between ranks; it names the first ones and their ranks, and the ``remedy``. ``local_ranks``: of
    each rank, where only ranks with the same one have copies of the same. Collective. Cost: :func:`fingerprint` of
    each."""
    if group.size == 1:
        return
    names, marks = [], []
    for name, value in copies:
        names.append(name)
        if torch.is_tensor(value):
            marks.append(fingerprint(value))
        else:
            marks.append(int.from_bytes(blake2b(text_of(value).encode(), digest_size=7).digest(), "little"))
    far = [mark for mark in marks if torch.is_tensor(mark)]
    arrived = iter(torch.stack(far).tolist() if far else [])
    values = [next(arrived) if torch.is_tensor(mark) else mark for mark in marks]
    everyones = _where_they_differ(group, json.dumps([names, values]), "replicas", local_ranks)
    if not everyones:
        return
    by_rank = [dict(zip(*each, strict=True)) for each in everyones]
    different: list[tuple[str, str]] = []
    for local_rank in sorted(set(local_ranks or [0])):
        members = [rank for rank in range(group.size) if local_ranks is None or local_ranks[rank] == local_rank]
        copies_there = {rank: by_rank[rank] for rank in members}
        for name in dict.fromkeys(name for each in copies_there.values() for name in each):
            if len({each.get(name) for each in copies_there.values()}) > 1:
                different.append((name, _copies(name, copies_there)))
    listed = "; ".join(f"{name} ({copies})" for name, copies in different[:_SHOWN])
    more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    raise DisagreementError(
        f"rank {group.rank}: after step {steps} ranks have different copies of {listed}{more}. {remedy}"
    )


def _copies(name: str, by_rank: dict[int, dict[str, Any]]) -> str:
    sides: dict[Any, list[int]] = {}
    for rank, each in by_rank.items():
        sides.setdefault(each.get(name), []).append(rank)
    return ", ".join(
        f"{ranks_of(ranks)}: {'none' if mark is None else f'copy {at}'}"
        for at, (mark, ranks) in enumerate(sides.items(), 1)
    )
