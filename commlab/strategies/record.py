"""What a rank says of its step, in the record that travels with the verdict: its number, what it divides by, what it
updates with, and what has happened to it since the last step.

    own      squares finite unused buffers written passes     each rank's own; what follows from all ranks' is the same
    common   number zero_grads begun failed total hypers      equal on all ranks, or no rank updates anything

While ranks agree, comparing is one comparison of bytes for each rank. Where they do not, one more exchange, which only
then is made, carries the values in words, so that the error names them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import DisagreementError
from ..precision.loss_scale import LossScale
from ..runtime.control import gather_bytes, ranks_of, sides_of
from ..runtime.group import Group
from .counts import StepCounts
from .hypers import HyperParameters
from .passes import Passes

_COMMON = struct.Struct("<qHHH?d8s")
_MOST = 0xFFFF
_UNCOUNTED, _UNKNOWN = -2.0, -1.0

_STEPS_ALIKE = 2
"""After so many steps in which all ranks called the model equally often, one that calls it more often is odd."""


class Common(NamedTuple):
    """What must be equal on all ranks."""

    number: int
    """The number of the step: the caller's own, where given."""
    zero_grads: int
    """Calls of ``zero_grad()`` since the last step."""
    begun: int
    """Calls of ``backward()`` outside ``no_sync()`` since the last step, those included that raised."""
    failed: int
    """Forward passes since the last step that raised."""
    numbered: bool
    """Whether the caller has given the number."""
    total: float
    """The step's global count, where the caller knows it."""
    hypers: bytes
    """A digest of the hyper-parameters."""


class StepRecord:
    """This rank's record of the step that is under way."""

    def __init__(
        self,
        group: Group,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_scale: LossScale | None,
        counts: StepCounts,
    ):
        self.number: int | None = None
        """The caller's own number of the step; None: the engine's."""
        self.zero_grads = 0
        """Calls of ``zero_grad()`` since the last step."""
        self.begun = 0
        """Calls of ``backward()`` outside ``no_sync()`` since the last step."""
        self.losses = 0
        """Calls of ``backward()`` with a loss since the last step."""
        self.losses_finite: list[torch.Tensor] = []
        """bool[] of each loss of the step that is under way, where anybody looks at them."""
        self.hypers = HyperParameters(optimizer, loss_scale)
        self._group, self._counts = group, counts
        self._passes = Passes(model)
        self._steps_alike = 0
        """Steps in which all ranks had as many forward passes for each backward pass; less than 0 for good after one
        in which they had not."""

    def reset(self) -> None:
        """Begin a new step, after one that was made."""
        self.number, self.zero_grads, self.begun, self.losses = None, 0, 0, 0
        self._passes.begun = self._passes.ended = 0

    def loss_is_finite(self) -> bool:
        """Whether all losses of the step that were looked at are finite. Waits for a GPU."""
        return all(map(bool, self.losses_finite))

    def close(self) -> None:
        """Take the hooks off the model."""
        self._passes.close()

    def passes(self) -> tuple[int, int]:
        """Forward passes that have ended, and losses that were given to ``backward()``, since the last step."""
        return min(self._passes.ended, _MOST), min(self.losses, _MOST)

    def common(self, steps: int) -> bytes:
        """The part that must be equal on all ranks. ``steps``: how many the engine has made."""
        counts, passes = self._counts, self._passes
        total = counts.total if counts.counted else _UNCOUNTED
        given = self.number is not None
        return _COMMON.pack(
            self.number if given else steps,
            min(self.zero_grads, _MOST),
            min(self.begun, _MOST),
            min(passes.begun - passes.ended, _MOST),
            given,
            _UNKNOWN if total is None else total,
            self.hypers.digest(),
        )

    def odd_ranks(self, passes: Sequence[tuple[int, int]]) -> list[int]:
        """The ranks that have called the model more often for each loss than others have, where ranks never differed
        in this before. ``passes``: all ranks' :meth:`passes`, equal on all ranks."""
        ratios = [forwards / losses if losses else 0.0 for forwards, losses in passes]
        present = {ratio for ratio in ratios if ratio}
        if len(present) < 2:
            self._steps_alike += self._steps_alike >= 0 and bool(present)
            return []
        if self._steps_alike >= _STEPS_ALIKE:
            return [rank for rank, ratio in enumerate(ratios) if ratio > min(present)]
        self._steps_alike = -1
        return []

    def require_alike(self, records: Sequence[bytes], odd: Sequence[int]) -> None:
        """DisagreementError, on all ranks, where ``records`` (all ranks' :meth:`common`) or ``odd``
        (:meth:`odd_ranks`) say that ranks are not in the same step, or would not update alike. Collective where they
        differ in hyper-parameters."""
        rows = [Common._make(_COMMON.unpack(record)) for record in records]
        problem = _numbers(rows) or ("" if all(row.numbered for row in rows) else _dropped(rows, odd))
        if not problem and len({row.total for row in rows}) > 1:
            sides = sides_of([_total_text(row.total) for row in rows])
            problem = f"backward() was given different totals of the step: {sides}"
            problem += "; give every rank the step's global count, over all ranks, or leave total out on all of them"
        if not problem and len({row.hypers for row in rows}) > 1:
            problem = self._hypers_differ()
        if problem:
            step = rows[self._group.rank].number
            raise DisagreementError(f"rank {self._group.rank}: in step {step} {problem}. Nothing was updated")

    def _hypers_differ(self) -> str:
        described = json.dumps(self.hypers.described()).encode()
        everyones = [json.loads(text) for text in gather_bytes(self._group, described, "hyper-parameters")]
        return (
            f"ranks would update with different hyper-parameters: {differences(everyones)}; give all ranks the same "
            "(a scheduler that follows a loss needs the loss of all ranks, and load_state_dict() must be called on "
            "every rank)"
        )


def differences(everyones: Sequence[list[dict[str, str]]]) -> str:
    """What differs in all ranks' hyper-parameters, as :meth:`HyperParameters.described` has them."""
    counts = [len(groups) for groups in everyones]
    if len(set(counts)) > 1:
        return "the number of parameter groups: " + sides_of([str(count - 1) for count in counts])
    found = []
    for at in range(counts[0]):
        for key in dict.fromkeys(key for groups in everyones for key in groups[at]):
            texts = [groups[at].get(key, "none") for groups in everyones]
            if len(set(texts)) > 1:
                what = key if at == counts[0] - 1 else f"{key!r} of parameter group {at}"
                found.append(f"{what}: {sides_of(texts)}")
    return "; ".join(found) or "values that look alike (another type, or a digit that is not shown)"


def _total_text(total: float) -> str:
    return {_UNCOUNTED: "no count", _UNKNOWN: "a count without total"}.get(total, f"{total:.17g}")


_WAY_OUT = (
    "a rank skipped a step, or caught an exception and went on. All ranks must make a step or drop it together "
    "(exchange whether to, and call zero_grad() on all of them); a forward pass that is not for training belongs into "
    "torch.no_grad(); engine.step(number), with the caller's own number of the step on every rank, says which steps "
    "belong together"
)


def _numbers(rows: Sequence[Common]) -> str:
    """What is wrong with the steps' numbers; empty where nothing is."""
    if len({row.numbered for row in rows}) > 1:
        return "some ranks have given engine.step() a number and others have not: " + sides_of(
            [str(row.number) if row.numbered else "none" for row in rows]
        )
    return "" if len({row.number for row in rows}) == 1 else _in_steps([row.number for row in rows], [""] * len(rows))


def _dropped(rows: Sequence[Common], odd: Sequence[int]) -> str:
    """Which ranks have dropped a step that others have made; empty where none has."""
    if len({row[1:4] for row in rows}) > 1:
        odd = ()  # what was called more often is known
    elif not odd:
        return ""
    numbers, reasons = [], []
    for rank, row in enumerate(rows):
        said = []
        for count, least, text in (
            (
                row.zero_grads,
                min(each.zero_grads for each in rows),
                "it called zero_grad() {} times since its last step",
            ),
            (row.begun, min(each.begun for each in rows), "it called backward() {} times since its last step"),
            (row.failed, min(each.failed for each in rows), "{} of its forward passes ended in an exception"),
        ):
            if count > least:
                said.append(text.format(count))
        if rank in odd and not said:
            said.append("it called the model more often than its losses need")
        numbers.append(row.number + bool(said))
        reasons.append(" and ".join(said))
    return _in_steps(numbers, reasons)


def _in_steps(numbers: Sequence[int], reasons: Sequence[str]) -> str:
    sides: dict[tuple[int, str], list[int]] = {}
    for rank, (number, reason) in enumerate(zip(numbers, reasons, strict=True)):
        sides.setdefault((number, reason), []).append(rank)
    # The side that is ahead first.
    listed = [
        f"{ranks_of(ranks)} {'are' if len(ranks) > 1 else 'is'} in step {number}" + (f" ({reason})" if reason else "")
        for (number, reason), ranks in sorted(sides.items(), reverse=True)
    ]
    return f"{', '.join(listed)}: {_WAY_OUT}"
