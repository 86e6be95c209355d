"""What users do to parameters and gradients beside the engine: seen before anything is updated.

    at any time                  parameters are given other memory      model.half(), p.data = ...
    between two steps            parameters are written in place        p.mul_(0.5), Embedding(max_norm=1.0)
    between backward and step    gradients are edited                   clip_grad_norm_(...), p.grad = None

torch counts the writes to a tensor, so to look costs a comparison of integers per parameter. Where every rank has
parameters and gradients of its own, edits count, and must be the same on all ranks: a digest of what was edited travels
with the verdict. What can't count is refused, on all ranks: a write where ranks share one copy of the parameters, which
would count once per rank, and an edit of a gradient that is on its way to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch

from ..errors import AgreedError, DisagreementError
from ..gradients.absent import AbsentGradients
from ..gradients.parameters import NamedParameter
from ..native.versions import count_write
from ..runtime.control import gather_bytes
from ..runtime.group import Group
from ..runtime.raw import fingerprint
from .drift import different_parameter
from .refusals import moved_text, piece_written_text, written_text
from .structure import Structure

REFUSED = 2**64 - 1
"""The digest of a rank that has something to refuse."""

_PROBES = 256
"""About how many numbers of a buffer a probe compares."""

_version, _address = attrgetter("_version"), torch.Tensor.data_ptr

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
    node share. ``absent``: what stands in ``p.grad`` where gradients are on their way to others. ``lying``: where
    parameters are updated where they lie now, and must stay: the strategy's name, and the model's structure.
    """

    def __init__(
        self,
        group: Group,
        parameters: Sequence[NamedParameter],
        *,
        instead: str = "",
        pieces: Iterable[tuple[str, torch.Tensor]] = (),
        shared: Iterable[tuple[str, torch.Tensor]] = (),
        absent: AbsentGradients | None = None,
        lying: tuple[str, Structure] | None = None,
    ):
        self._group, self._parameters, self._instead = group, parameters, instead
        self._tensors = [item.tensor for item in parameters]
        self._pieces = list(pieces)
        self._piece_tensors = [tensor for _, tensor in self._pieces]
        self._probes = [(name, Probe(flat)) for name, flat in shared]
        self._gradients: list[Gradient] = []
        self._absent, self._away = absent, False
        self._changed: Sequence[str] = ()
        """Parameters whose ``p.grad`` was changed while it was absent."""
        self._lying = lying
        # Numbers, not tensors to compare with: where torch gives a storage other memory in place, all tensors that
        # share it move, those kept here too.
        self._addresses = [] if lying is None else list(map(_address, self._tensors))
        self.note()

    def _moved(self) -> NamedParameter | None:
        """A parameter that no longer lies where it is updated, or is another one by now; None where all do."""
        if self._lying is None:
            return None
        addresses, structure = list(map(_address, self._tensors)), self._lying[1]
        if addresses == self._addresses and structure.same_structure():
            return None
        present, rows = structure.present(), zip(self._parameters, addresses, self._addresses, strict=True)
        return next((item for item, now, then in rows if now != then or id(item.tensor) not in present), None)

    # Parameters, between two steps.

    def note(self) -> None:
        """From here on a write to a parameter is the user's."""
        self._versions = list(map(_version, self._tensors))
        self.note_pieces()

    def note_pieces(self) -> None:
        """From here on a write to what the optimizer has is a write outside of its step."""
        self._piece_versions = list(map(_version, self._piece_tensors))
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
        count_write(self._tensors)
        for at, item in enumerate(self._parameters):
            if item.index not in before:
                self._versions[at] = item.tensor._version
        self.note_pieces()

    def written_parameters(self) -> list[NamedParameter]:
        """The parameters that were written since :meth:`note`."""
        versions = list(map(_version, self._tensors))
        if versions == self._versions:
            return []
        rows = zip(self._parameters, versions, self._versions, strict=True)
        return [item for item, now, then in rows if now != then]

    def written_pieces(self) -> list[str]:
        """What was written since :meth:`note` of what the optimizer has, or by ways that torch does not count."""
        found: list[str] = []
        versions = list(map(_version, self._piece_tensors))
        if versions != self._piece_versions:
            rows = zip(self._pieces, versions, self._piece_versions, strict=True)
            found = [name for (name, _), now, then in rows if now != then]
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

    def put_absent(self) -> None:
        """Let every ``p.grad`` say that the gradient is on its way. Cost: about 0.6 us a tensor."""
        assert self._absent is not None
        for _, tensor, absent in self._absent.entries:
            tensor.grad = absent
        self._away, self._changed = True, ()

    def remove_absent(self) -> None:
        """Leave every ``p.grad`` None, and note for :meth:`refusal` which was no longer what :meth:`put_absent` has put
        there. Nothing is done where nothing was put."""
        if not self._away or self._absent is None:
            return
        changed: dict[str, None] = {}
        for name, tensor, absent in self._absent.entries:
            if tensor.grad is not absent:
                changed[name] = None
            tensor.grad = None
        self._away, self._changed = False, tuple(changed)

    # Agreement.

    def refusal(self) -> str:
        """What to say of edits that can't count; empty where there are none."""
        rank = self._group.rank
        # First: model.to() changes p.grad too, and the parameter matters more.
        if self._lying is not None and (moved := self._moved()):
            return moved_text(rank, moved.name, self._lying[0])
        if self._absent is not None and self._changed:
            return self._absent.complaint(rank, self._changed)
        if self._instead and (found := self.written_parameters()):
            return written_text(rank, [item.name for item in found], self._instead)
        if names := self.written_pieces():
            return piece_written_text(rank, names[0])
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
            digests = [0] * len(self._parameters)
            for item in found:
                digests[item.index] = _mix(0, item.index, _bits(look(item)))
            if different := different_parameter(self._group, self._parameters, digests):
                name, sides = different
                return (
                    f"rank {self._group.rank}: parameter {name!r} was {what}, and not alike on all ranks: {sides}. "
                    f"Their parameters would drift apart, so nothing was updated; {remedy}"
                )
        raise AssertionError("digests of ranks differ, and those of single parameters do not")


def _mix(mixed: int, index: int, bits: int) -> int:
    """A digest that also depends on which parameter it was, and is never 0 nor REFUSED."""
    return ((mixed ^ bits) * 0x9E3779B97F4A7C15 + 2 * index + 1) % (REFUSED - 1) + 1


def _bits(tensor: torch.Tensor | None) -> int:
    """What differs where the numbers do; of None a number too."""
    return 1 if tensor is None else int(fingerprint(tensor))
