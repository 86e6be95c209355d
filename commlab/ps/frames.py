"""Frames: many small tensors in one message. Both sides lay them out here.

    entries    (first, slices) of each, ascending        uint32[:, 2]
    versions   of each entry's value, in answers alone   int64[:]
    body       the numbers, in the order of the entries; of a refusal the reason, as text

An entry is what one call of a worker sends to one server. Entries that adjoin are one *span* in the server's flat
tensor, so that thousands of entries cost a few operations on tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from ..errors import CommlabError
from .messages import Header

Entry: TypeAlias = tuple[int, int]
"""The first of an entry's slices, and how many slices it has."""

_ENTRY_BYTES = 8
_VERSION_BYTES = 8


class Frame(NamedTuple):
    """The content of a frame. ``body``: bytes that begin at a multiple of 8 bytes."""

    entries: list[Entry]
    versions: list[int]
    body: torch.Tensor


def pack(entries: Sequence[Entry], body: torch.Tensor, versions: Sequence[int] | None = None) -> torch.Tensor:
    """The bytes that follow a frame's header, whose ``key`` is the number of entries. ``body``: 1-D, of any dtype."""
    tables = [torch.from_numpy(np.array(entries, np.uint32)).view(-1).view(torch.uint8)]
    if versions is not None:
        tables.append(torch.from_numpy(np.array(versions, np.int64)).view(torch.uint8))
    return torch.cat([*tables, body.view(torch.uint8)])


def unpack(header: Header, data: torch.Tensor, frm: str, versions: bool = False) -> Frame:
    """The reverse of :func:`pack`. CommlabError, naming ``frm``, for bytes that hold no such frame."""
    count = header.key
    start = count * _ENTRY_BYTES
    stop = start + count * _VERSION_BYTES * versions
    if stop > data.numel():
        raise CommlabError(f"{frm} sent a frame of {count} entries in {data.numel()} B")
    table = data[:start].numpy().view(np.uint32).reshape(-1, 2)
    entries: list[Entry] = [(first, slices) for first, slices in table.tolist()]
    return Frame(entries, data[start:stop].numpy().view(np.int64).tolist(), data[stop:])


def joined(entries: Iterable[Entry]) -> list[list[Entry]]:
    """``entries``, those that adjoin together."""
    found: list[list[Entry]] = []
    stop = -1
    for entry in entries:
        if entry[0] == stop:
            found[-1].append(entry)
        else:
            found.append([entry])
        stop = entry[0] + entry[1]
    return found
