"""What the ranks of a process set have announced: a table that every rank keeps from the same announcements, so all of
them know which operations are ready everywhere, and in which order they are carried out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from .announcement import Announcement, announcement_of, refusal
from .submission import HorovodInternalError, Submission

_CACHED = 4096
"""So many requests of each rank are known by a number; then the numbers begin anew."""


class Ready(NamedTuple):
    """An operation that is to be carried out now, by all ranks of the set."""

    request: Announcement
    """Of a rank that contributes."""
    requests: dict[int, Announcement]
    """By the announcing rank's number in the set."""
    submission: Submission | None
    """This rank's own part; None where it has joined."""
    anew: bool
    """Whether a rank has waited for an earlier one before it asked for this one."""


class Heard(NamedTuple):
    """What the records of one tick were."""

    anything: bool
    """Whether any rank had something to say."""
    left: str
    """Who takes part no longer, and why; empty where nobody has said so."""
    missed: list[Announcement]
    """Patterns of batches that a rank had foreseen, one of each (:mod:`.foreseen`)."""


class Announced:
    """The table of the process set that has ``ranks`` of the job, on ``rank``. :meth:`message` is for who tells the
    others; all else follows from what all ranks have told (:meth:`hear`)."""

    def __init__(self, ranks: Sequence[int], rank: int):
        self._ranks, self._rank = ranks, rank
        self._table: dict[str, dict[int, Announcement]] = {}
        """By name: what has been announced, by the announcing rank's number in the set."""
        self._joined: dict[int, dict[str, int]] = {}
        """By the joined rank's number in the set: how many operations without a name it has named."""
        self._cache: list[list[Announcement]] = [[] for _ in ranks]
        self._numbers: dict[Announcement, int] = {}
        self._anew: set[str] = set()
        self.under_way = 0
        """How many operations this rank has announced, and others have not."""

    @property
    def anybody_joined(self) -> bool:
        """Whether a rank has joined and others have not."""
        return bool(self._joined)

    def message(self, submitted: Sequence[Submission]) -> dict[str, Any]:
        """What this rank says of the operations in ``submitted``: a full request the first time, a number when the same
        request comes again. As JSON has it."""
        items: list[Any] = []
        self.under_way += len(submitted)
        message: dict[str, Any] = {}
        fresh = len(self._numbers) > _CACHED
        if fresh:
            self._numbers.clear()
            message["fresh"] = True
        for submission in submitted:
            request = submission.request
            number = self._numbers.get(request)
            if number is not None:
                items.append(number)
                continue
            if request.named:
                self._numbers[request] = len(self._numbers)
            items.append(list(request))
        if items:
            message["ready"] = items
            if anew := [index for index, submission in enumerate(submitted) if submission.anew]:
                message["anew"] = anew
        return message

    def hear(self, records: Sequence[bytes]) -> Heard:
        """Enter what the ranks have announced: their messages as JSON, each with ``join`` and ``left`` where a rank has
        joined or takes part no longer, and ``missed`` after a batch that was foreseen in vain; an empty one says
        nothing."""
        left, missed = [], []
        anything = False
        for peer, record in enumerate(records):
            if not record:
                continue
            anything = True
            message = json.loads(record)
            cache = self._cache[peer]
            if message.get("fresh"):
                cache.clear()
            anew = message.get("anew", ())
            for index, item in enumerate(message.get("ready", ())):
                if isinstance(item, int):
                    request = cache[item]
                else:
                    request = announcement_of(item)
                    if request.named:
                        cache.append(request)
                self._table.setdefault(request.name, {})[peer] = request
                if index in anew:
                    self._anew.add(request.name)
            if "join" in message:
                self._joined[peer] = json.loads(message["join"])
            if "left" in message:
                left.append(f"rank {self._ranks[peer]} {message['left']}")
            if "missed" in message:
                missed.append(announcement_of(message["missed"]))
        return Heard(anything, "; ".join(left), missed)

    def take_ready(self, submissions: dict[str, Submission]) -> list[Ready]:
        """Take out what all ranks have announced or joined, in the order in which it was first announced. What the
        ranks disagree about ends here, on all of them. ``submissions``: this rank's, by name; those that are taken out
        of the table are taken out of there too."""
        found: list[Ready] = []
        size, me = len(self._ranks), self._ranks.index(self._rank)
        for name, row in self._table.copy().items():
            if len(row) < size and any(peer not in row and peer not in self._joined for peer in range(size)):
                continue
            del self._table[name]
            self.under_way -= me in row
            anew = name in self._anew
            self._anew.discard(name)
            submission = submissions.pop(name, None)
            requests = {self._ranks[peer]: request for peer, request in row.items()}
            reason = refusal(self._rank, name, requests, {self._ranks[peer] for peer in self._joined})
            if reason:
                if submission is not None:
                    submission.end(HorovodInternalError(reason))
                continue
            request = next((each for each in row.values() if not each.absent), None)
            if request is None:  # nobody has anything to contribute
                if submission is not None:
                    submission.outputs = []
                    submission.end()
                continue
            found.append(Ready(request, row, submission, anew))
        return found

    def end_join(self) -> tuple[int, dict[str, int]] | None:
        """Once all ranks have joined: the rank that joined last, and the number from which all count on for each kind
        of operation without a name; the next join begins anew. None before."""
        if len(self._joined) < len(self._ranks):
            return None
        # Ranks that joined early have named fewer operations: from here on all count on from the same number.
        counters: dict[str, int] = {}
        for sent in self._joined.values():
            for kind, count in sent.items():
                counters[kind] = max(counters.get(kind, 0), count)
        last = self._ranks[list(self._joined)[-1]]
        self._joined.clear()
        return last, counters

    def lacking(self, name: str) -> list[int] | None:
        """The ranks that have not announced ``name``; None where this rank's own announcement is still to be heard."""
        row = self._table.get(name)
        if row is None or self._ranks.index(self._rank) not in row:
            return None
        there = {*row, *self._joined}
        return [rank for peer, rank in enumerate(self._ranks) if peer not in there]
