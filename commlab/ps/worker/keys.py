"""The keys of a parameter server, the same on all ranks: which tensors they name, and who has their slices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from hashlib import sha256

import torch

from ...errors import DisagreementError, UsageError
from ...runtime.control import exchange_records, gather_bytes
from ...runtime.group import Group
from ..messages import WIRE_CODES
from ..placement import Entry, Placement, deal


class Keys:
    """``named_params`` and ``groups`` as :class:`commlab.ParameterServer` is given them, dealt out to ``servers``
    servers. UsageError for two tensors of one name, and for dtypes that no server has. ``rank`` is for messages."""

    def __init__(
        self,
        named_params: Iterable[tuple[str, torch.Tensor]],
        groups: Mapping[str, int],
        servers: int,
        rank: int,
    ):
        self.rank = rank
        self.tensors: dict[str, torch.Tensor] = {}
        """The tensors as they were given; of tied tensors only the first."""
        self.entry_of: dict[str, int] = {}
        """By key: the index of its tensor in ``placement.entries``."""
        self.placement: Placement = deal(self._entries(named_params, groups), servers)

    def _entries(self, named_params: Iterable[tuple[str, torch.Tensor]], groups: Mapping[str, int]) -> list[Entry]:
        entries: list[Entry] = []
        known: dict[object, int] = {}
        for name, tensor in named_params:
            if name in self.entry_of:
                raise UsageError(f"two tensors are named {name!r}; a key names one")
            if tensor.dtype not in WIRE_CODES:
                kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in WIRE_CODES)
                raise UsageError(
                    f"{name!r} is {tensor.dtype}; a parameter server has {kinds}: cast it, or leave it out"
                )
            # Tied tensors are the same numbers under two names.
            same = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
            if same not in known:
                known[same] = len(entries)
                entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, groups.get(name, 0)))
                self.tensors[name] = tensor
            self.entry_of[name] = known[same]
        return entries

    def require_agreement(self, everyone: Group, rules: str) -> None:
        """DisagreementError on every rank unless all ranks were given the same tensors and rules. Collective."""
        lines = [rules, *(f"{name!r} is {self.placement.entries[at]}" for name, at in self.entry_of.items())]
        digest = sha256("\n".join(lines).encode()).digest()
        if len(set(exchange_records(everyone, digest, "parameter server"))) == 1:
            return
        texts = [text.decode().split("\n") for text in gather_bytes(everyone, "\n".join(lines).encode(), "the stores")]
        other = next(rank for rank, text in enumerate(texts) if text != lines) if texts[0] == lines else 0
        at = next(
            (at for at, (mine, theirs) in enumerate(zip(lines, texts[other], strict=False)) if mine != theirs),
            min(len(lines), len(texts[other])),
        )
        mine, theirs = (text[at] if at < len(text) else "nothing more" for text in (lines, texts[other]))
        raise DisagreementError(
            f"rank {everyone.rank} and rank {other} make different parameter servers: here {mine}; there {theirs}. "
            "Build it with the same arguments on all ranks, servers included"
        )

    def entry(self, key: str) -> Entry:
        """The tensor that ``key`` names. UsageError, with similar keys, for a key that there is not."""
        if key not in self.entry_of:
            near = difflib.get_close_matches(key, self.entry_of, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {len(self.entry_of)} keys"
            raise UsageError(f"rank {self.rank}: the parameter server has no key {key!r}; {hint}")
        return self.placement.entries[self.entry_of[key]]

    def require(self, key: str, tensor: torch.Tensor, what: str) -> None:
        """UsageError unless ``tensor`` has the shape and dtype of ``key``; ``what`` is to be done with it."""
        entry = self.entry(key)
        if tensor.shape != entry.shape or tensor.dtype is not entry.dtype:
            mine, theirs = (
                f"{str(dtype).removeprefix('torch.')}{list(shape)}"
                for dtype, shape in ((tensor.dtype, tensor.shape), (entry.dtype, entry.shape))
            )
            raise UsageError(
                f"rank {self.rank}: {what} of {key!r} with a tensor of {mine}, and the parameter server has "
                f"{theirs}; give one of that shape and dtype"
            )
