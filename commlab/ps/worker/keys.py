"""The keys of a parameter server, the same on all ranks: which tensors they name, and who has their slices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, NoReturn

import torch

from ...errors import DisagreementError, UsageError
from ...runtime.control import exchange_records, gather_bytes
from ...runtime.group import Group
from ..messages import MESSAGE_BYTES, WIRE_CODES
from ..placement import Entry, Placement, deal


class Span(NamedTuple):
    """Adjoining slices ``first .. first + slices - 1`` of a server, which travel in one message, and where their
    numbers lie in a flat tensor of this worker."""

    server: int
    first: int
    slices: int
    start: int
    stop: int


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
        self._spans: dict[tuple[str, ...], list[Span]] = {}
        self.placement: Placement = deal(self._entries(named_params, groups), servers)

    def _entries(self, named_params: Iterable[tuple[str, torch.Tensor]], groups: Mapping[str, int]) -> list[Entry]:
        entries: list[Entry] = []
        known: dict[object, int] = {}
        for item in named_params:
            if not (isinstance(item, (tuple, list)) and len(item) == 2):
                raise UsageError(f"named_params has {type(item).__name__} {item!r:.60}; give (name, tensor) pairs")
            name, tensor = item
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise UsageError(
                    f"named_params has the pair ({name!r:.60}, a {type(tensor).__name__}); give text and a tensor"
                )
            if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta or _wraps(tensor):
                raise UsageError(f"{name!r} has no plain memory (sparse, nested, meta or a wrapper); leave it out")
            group = groups.get(name, 0)
            if type(group) is not int or group < 0:
                raise UsageError(f"the group of {name!r} is {group!r}; give the number of the optimizer's group")
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
                entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, group))
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

    def entry(self, key: Any) -> Entry:
        """The tensor that ``key`` names. UsageError, with similar keys, for a key that there is not."""
        at = self.entry_of.get(key) if isinstance(key, str) else None
        if at is None:
            if not isinstance(key, str):
                hint = f"keys are the tensors' names, as text, and this is a {type(key).__name__}"
            elif near := difflib.get_close_matches(key, self.entry_of, n=3, cutoff=0.4):
                hint = f"did you mean {', '.join(map(repr, near))}?"
            else:
                hint = f"there are {len(self.entry_of)} keys"
            raise UsageError(f"rank {self.rank}: the parameter server has no key {key!r}; {hint}")
        return self.placement.entries[at]

    def spans_of(self, keys: tuple[str, ...]) -> list[Span]:
        """The spans that carry these tensors, which lie side by side in a flat tensor."""
        if keys not in self._spans:
            spans: list[Span] = []
            placement, base = self.placement, 0
            for key in keys:
                self.entry(key)
                entry = self.entry_of[key]
                itemsize = placement.entries[entry].dtype.itemsize
                for owned in placement.of_entry[entry]:
                    start, stop = base + owned.start, base + owned.stop
                    last = spans[-1] if spans else None
                    if (
                        last is not None
                        and (last.server, last.first + last.slices, last.stop) == (owned.server, owned.number, start)
                        and (stop - last.start) * itemsize <= MESSAGE_BYTES
                    ):
                        spans[-1] = last._replace(slices=last.slices + 1, stop=stop)
                    else:
                        spans.append(Span(owned.server, owned.number, 1, start, stop))
                base += placement.entries[entry].numel
            self._spans[keys] = spans
        return self._spans[keys]

    def require(self, key: str, tensor: Any, what: str) -> None:
        """UsageError unless ``tensor`` has the shape and dtype of ``key``, and plain memory; ``what`` is to be done
        with it."""
        entry = self.entry(key)
        if not isinstance(tensor, torch.Tensor):
            self._refuse(
                key, what, f"a {type(tensor).__module__}.{type(tensor).__qualname__}, which is no torch tensor"
            )
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta or _wraps(tensor):
            kind = str(tensor.layout).removeprefix("torch.") if tensor.layout is not torch.strided else "nested"
            kind = "meta" if tensor.is_meta else f"wrapper ({type(tensor).__name__})" if _wraps(tensor) else kind
            self._refuse(key, what, f"a {kind} tensor, whose numbers are not side by side in memory")
        if tensor.shape != entry.shape or tensor.dtype is not entry.dtype:
            mine, theirs = (
                f"{str(dtype).removeprefix('torch.')}{list(shape)}"
                for dtype, shape in ((tensor.dtype, tensor.shape), (entry.dtype, entry.shape))
            )
            raise UsageError(
                f"rank {self.rank}: {what} of {key!r} with a tensor of {mine}, and the parameter server has "
                f"{theirs}; give one of that shape and dtype"
            )

    def require_out(self, key: str, out: torch.Tensor, what: str) -> None:
        """:meth:`require`, and that each number of ``out`` has memory of its own."""
        self.require(key, out, what)
        if not out.is_contiguous() and any(
            stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)
        ):
            self._refuse(key, what, "an expanded tensor, whose numbers share memory")

    def require_flat(self, keys: Sequence[str], flat: Any, what: str, wire: torch.dtype | None) -> None:
        """UsageError unless ``flat`` (1-D) holds the tensors ``keys``, all of its dtype or travelling in ``wire``."""
        if not isinstance(flat, torch.Tensor):
            self._refuse(str(keys), what, f"a {type(flat).__qualname__}, which is no torch tensor")
        entries = [self.entry(key) for key in keys]
        numel = sum(entry.numel for entry in entries)
        dtypes = {entry.dtype for entry in entries} - {flat.dtype}
        if flat.dim() != 1 or flat.numel() != numel or (dtypes and flat.dtype is not wire):
            named = ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(dtypes, key=str))
            raise UsageError(
                f"rank {self.rank}: {what} of {len(entries)} tensors with {str(flat.dtype).removeprefix('torch.')}"
                f"{list(flat.shape)}; they have {numel} numbers side by side{named and ' of '}{named}"
            )

    def _refuse(self, key: str, what: str, why: str) -> NoReturn:
        raise UsageError(
            f"rank {self.rank}: {what} of {key!r} with {why}; give a dense torch tensor on the CPU or a GPU"
        )


def _wraps(tensor: torch.Tensor) -> bool:
    """Whether a subclass has its numbers in other tensors."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
