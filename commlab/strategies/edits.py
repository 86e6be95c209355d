"""What users do to parameters and gradients beside the engine: seen before anything is updated.

    between two steps            parameters are written in place        p.mul_(0.5), Embedding(max_norm=1.0)
    between backward and step    gradients are edited                   clip_grad_norm_(...), p.grad = None

torch counts the writes to a tensor, so to look costs a comparison of integers per parameter. Where every rank has
parameters and gradients of its own, edits count, and must be the same on all ranks: a digest of what was edited travels
with the verdict. Where ranks share one copy of the parameters, a write would count once per rank, and is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from ..errors import AgreedError, DisagreementError
from ..gradients.parameters import NamedParameter
from ..native.versions import count_write
from ..runtime.control import exchange_records, gather_bytes
from ..runtime.group import Group
from ..runtime.raw import fingerprint

REFUSED = 2**64 - 1
"""The digest of a rank that has something to refuse."""

_PROBES = 256
"""About how many numbers of a buffer a probe compares."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Probe:
    """Some numbers of a flat buffer, for writes that torch does not count (``p.data.mul_()``, ``p.grad.data.mul_()``):
    seen where they change one of up to 256 numbers. Cost: about 5 us to note, and to compare."""

    def __init__(self, flat: torch.Tensor):
        # The bits: a NaN is not equal to itself.
        self._numbers = flat.view(_BITS[flat.element_size()])[:: max(1, flat.numel() // _PROBES)]
        self._noted = self._numbers.clone()

    def note(self) -> None:
        """From here on a change is the user's."""
        self._noted.copy_(self._numbers)

    def changed(self) -> bool:
        """Whether a number has changed since :meth:`note`."""
        return not torch.equal(self._numbers, self._noted)


class Gradient(NamedTuple):
    """What an engine has put into ``p.grad`` of a parameter, and how often that was written then."""

    tensor: torch.Tensor | None
    version: int


class Edits:
    """The parameters of one engine, and their gradients while they wait for ``step()``.

    ``instead``: why a write between two steps can't count, where it can't: what every rank has is not its own.
    ``pieces``: the tensors that the optimizer has in place of parameters. ``shared``: flat buffers that the ranks of a
    node share.
    """

    def __init__(
        self,
        group: Group,
        parameters: Sequence[NamedParameter],
        *,
        instead: str = "",
        pieces: Iterable[tuple[str, torch.Tensor]] = (),
        shared: Iterable[tuple[str, torch.Tensor]] = (),
    ):
        self._group, self._parameters, self._instead = group, parameters, instead
        self._pieces = list(pieces)
        self._probes = [(name, Probe(flat)) for name, flat in shared]
        self._gradients: list[Gradient] = []
        self.note()

    # Parameters, between two steps.

    def note(self) -> None:
        """From here on a write to a parameter is the user's."""
        self._versions = [item.tensor._version for item in self._parameters]
        self.note_pieces()

    def note_pieces(self) -> None:
        """From here on a write to what the optimizer has is a write outside of its step."""
        self._piece_versions = [tensor._version for _, tensor in self._pieces]
        for _, probe in self._probes:
            probe.note()

    def updated(self, passed_over: set[int]) -> None:
        """A step has written all parameters but those ``passed_over`` (by index), here or through memory that autograd
        does not see."""
        count_write([item.tensor for item in self._parameters if item.index not in passed_over])
        self.note()

    def exchanged(self) -> None:
        """Between two steps parameters have become those of other ranks. What the user has written is still seen."""
        before = {item.index for item in self.written_parameters()}
        count_write([item.tensor for item in self._parameters])
        for at, item in enumerate(self._parameters):
            if item.index not in before:
                self._versions[at] = item.tensor._version
        self.note_pieces()

    def written_parameters(self) -> list[NamedParameter]:
        """The parameters that were written since :meth:`note`."""
        return [
            item
            for item, version in zip(self._parameters, self._versions, strict=True)
            if item.tensor._version != version
        ]

    def written_pieces(self) -> list[str]:
        """What was written since :meth:`note` of what the optimizer has, or by ways that torch does not count."""
        found = [
            name
            for (name, tensor), version in zip(self._pieces, self._piece_versions, strict=True)
            if tensor._version != version
        ]
        return found + [name for name, probe in self._probes if probe.changed()]

    # Gradients, between backward and step.

    def note_gradients(self) -> None:
        """From here on a change of ``p.grad`` is the user's."""
        self._gradients = [
            Gradient(gradient, 0 if gradient is None else gradient._version)
            for gradient in (item.tensor.grad for item in self._parameters)
        ]

    def note_gradient(self, index: int) -> None:
        """The same for one parameter, whose ``p.grad`` the engine has set since."""
        gradient = self._parameters[index].tensor.grad
        self._gradients[index] = Gradient(gradient, 0 if gradient is None else gradient._version)

    def edited_gradients(self) -> list[NamedParameter]:
        """The parameters whose ``p.grad`` was edited since :meth:`note_gradients`."""
        found = []
        for item, (tensor, version) in zip(self._parameters, self._gradients, strict=False):
            gradient = item.tensor.grad
            if gradient is not tensor or (gradient is not None and gradient._version != version):
                found.append(item)
        return found

    def forget_gradients(self) -> None:
        """The step is over, or dropped."""
        self._gradients = []

    # Agreement.

    def refusal(self) -> str:
        """What to say of writes that cannot count; empty where there are none."""
        rank = self._group.rank
        if self._instead and (found := self.written_parameters()):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            return (
                f"rank {rank}: parameter {found[0].name!r}{more} was written between two steps, by something else than "
                f"the engine; {self._instead}. Write parameters by engine.update_parameters(lambda model: ...), which "
                "has the write count once, on all ranks"
            )
        if names := self.written_pieces():
            return (
                f"rank {rank}: {names[0]} was written outside of the optimizer's step, and other ranks may have "
                "computed with it before. Where an optimizer exchanges parameters (eval() and train() of schedule-free "
                "ones, the swap of SWA), call engine.settle() after it, on all ranks; write parameters yourself by "
                "engine.update_parameters(lambda model: ...), and not through p.data"
            )
        return ""

    def digest(self, refusal: str, edited: Sequence[NamedParameter] = ()) -> int:
        """What the verdict's record says of this rank: 0 where nothing was edited or written; REFUSED where there is a
        ``refusal``; else a digest of all that was, ``edited`` gradients too, which is the same on all ranks or an
        error. Cost where something was: a pass over it."""
        if refusal:
            return REFUSED
        mixed = 0
        for item in self.written_parameters():
            mixed = _mix(mixed, item.index, _bits(item.tensor))
        for item in edited:
            mixed = _mix(mixed, ~item.index, _bits(item.tensor.grad))
        return mixed

    def require_alike(self, digests: Sequence[int], refusal: str, edited: Sequence[NamedParameter] = ()) -> None:
        """AgreedError where any rank's digest is REFUSED, with the ranks' refusals; DisagreementError where digests
        differ, which names what differs and the ranks. All ranks raise the same kind. Collective where one is
        raised."""
        if len(set(digests)) == 1 and digests[0] != REFUSED:
            return
        if REFUSED in digests:
            texts = [text.decode() for text in gather_bytes(self._group, refusal.encode(), "what a rank refuses")]
            ranks = [rank for rank, text in enumerate(texts) if text]
            where = "" if len(ranks) == 1 else f" (so it is on ranks {', '.join(map(str, ranks))})"
            raise AgreedError(f"{texts[ranks[0]]}{where}; nothing was updated")
        raise DisagreementError(self._difference(edited))

    def _difference(self, edited: Sequence[NamedParameter]) -> str:
        """The first parameter that ranks have treated in different ways. Collective."""
        count = len(self._parameters)
        for what, found, tensor_of, remedy in (
            (
                "written between two steps",
                self.written_parameters(),
                lambda item: item.tensor,
                "write parameters by engine.update_parameters(lambda model: ...)",
            ),
            (
                "given another p.grad between backward() and step()",
                edited,
                lambda item: item.tensor.grad,
                "edit the reduced gradient alike on all ranks (with random numbers: drawn alike), or clip by "
                "max_grad_norm=, whose norm is one on all ranks",
            ),
        ):
            look: Callable[[NamedParameter], torch.Tensor | None] = tensor_of
            digests = [0] * count
            for item in found:
                digests[item.index] = _mix(0, item.index, _bits(look(item)))
            records = exchange_records(self._group, struct.pack(f"<{count}Q", *digests), "what was edited")
            rows = [struct.unpack(f"<{count}Q", record) for record in records]
            for item in self._parameters:
                column = [row[item.index] for row in rows]
                if len(set(column)) > 1:
                    # The most frequent one may be right; the others are named.
                    usual = max(column, key=column.count)
                    others = [rank for rank, each in enumerate(column) if each != usual]
                    return (
                        f"rank {self._group.rank}: parameter {item.name!r} was {what}, and not alike on all ranks: "
                        f"ranks {', '.join(map(str, others))} differ from "
                        f"{', '.join(str(rank) for rank in range(len(rows)) if rank not in others)}. Their parameters "
                        f"would drift apart, so nothing was updated; {remedy}"
                    )
        raise AssertionError("digests of ranks differ, and those of single parameters do not")


def _mix(mixed: int, index: int, bits: int) -> int:
    """A digest that also depends on which parameter it was, and is never 0 nor REFUSED."""
    return ((mixed ^ bits) * 0x9E3779B97F4A7C15 + 2 * index + 1) % (REFUSED - 1) + 1


def _bits(tensor: torch.Tensor | None) -> int:
    """What differs where the numbers do; of None a number too."""
    return 1 if tensor is None else int(fingerprint(tensor))
