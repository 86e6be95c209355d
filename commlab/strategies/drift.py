"""The words for ranks that have drifted apart: which of them are in another step, what they would update with
otherwise, and which parameter was edited on some of them alone. Nothing here is asked while ranks agree."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import DisagreementError
from ..gradients.parameters import NamedParameter
from ..runtime.control import exchange_records, gather_bytes, ranks_of, sides_of
from ..runtime.group import Group
from .hypers import HyperParameters

UNCOUNTED, UNKNOWN = -2.0, -1.0
"""What stands for the total of a step whose losses have no counts, and for a total that the caller does not know."""

_WAY_OUT = (
    "a rank skipped a step, or caught an exception and went on. All ranks must make a step or drop it together "
    "(exchange whether to, and call zero_grad() on all of them); a forward pass that is not for training belongs into "
    "torch.no_grad(); engine.step(number), with the caller's own number of the step on every rank, says which steps "
    "belong together"
)


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


def require_together(group: Group, rows: Sequence[Common], odd: Sequence[int], hypers: HyperParameters) -> None:
    """DisagreementError, on all ranks, where ``rows``, of every rank, or ``odd``, the ranks that have called the model
    more often than others, say that ranks are not in the same step, or would not update alike. Collective where they
    differ in ``hypers``."""
    problem = _numbers(rows) or ("" if all(row.numbered for row in rows) else _dropped(rows, odd))
    if not problem and len({row.total for row in rows}) > 1:
        sides = sides_of([_total_text(row.total) for row in rows])
        problem = f"backward() was given different totals of the step: {sides}"
        problem += "; give every rank the step's global count, over all ranks, or leave total out on all of them"
    if not problem and len({row.hypers for row in rows}) > 1:
        problem = _hypers_differ(group, hypers)
    if problem:
        step = rows[group.rank].number
        raise DisagreementError(f"rank {group.rank}: in step {step} {problem}. Nothing was updated")


def _hypers_differ(group: Group, hypers: HyperParameters) -> str:
    described = json.dumps(hypers.described()).encode()
    everyones = [json.loads(text) for text in gather_bytes(group, described, "hyper-parameters")]
    return (
        f"ranks would update with different hyper-parameters: {_differences(everyones)}; give all ranks the same "
        "(a scheduler that follows a loss needs the loss of all ranks, and load_state_dict() must be called on "
        "every rank)"
    )


def _differences(everyones: Sequence[list[dict[str, str]]]) -> str:
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
    return {UNCOUNTED: "no count", UNKNOWN: "a count without total"}.get(total, f"{total:.17g}")


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


def different_parameter(
    group: Group, parameters: Sequence[NamedParameter], digests: Sequence[int]
) -> tuple[str, str] | None:
    """The name of the first of ``parameters`` that ranks have treated in different ways, and which ranks differ from
    which, in words; None where there is none. ``digests``: of what this rank has done to each. Collective."""
    record = struct.pack(f"<{len(digests)}Q", *digests)
    rows = [struct.unpack(f"<{len(digests)}Q", each) for each in exchange_records(group, record, "what was edited")]
    for item in parameters:
        column = [row[item.index] for row in rows]
        if len(set(column)) > 1:
            # The most frequent one may be right; the others are named.
            usual = max(column, key=column.count)
            others = [rank for rank, each in enumerate(column) if each != usual]
            rest = [rank for rank in range(len(rows)) if rank not in others]
            return item.name, f"ranks {', '.join(map(str, others))} differ from {', '.join(map(str, rest))}"
    return None
