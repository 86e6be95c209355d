"""The protocol of the leaders (kernels/links/leaders.h), every interleaving of it: a rank's steps are what it does
between two looks at what others have written or sent, and any rank may be next.

Each rank chooses for each operation whether it begins by the short way or the long one, and whether it announces what
the others do. Checked in every state: nobody has a result by the short way while another rank takes the long one, and
none where ranks differ; an announcement is taken for the operation that it is for; no page is written that somebody
reads. And where no rank can make a step, all operations have ended on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import pytest

T = TypeVar("T")
Channels = tuple[tuple[tuple[int, int], ...], ...]


class Rank(NamedTuple):
    """What a rank knows by itself. ``phase``: as in ``Leaders``, where ``sums`` are on their way to other leaders, then
    ``rest``, what their frames had no room for, and ``shares`` back; ``read`` is between a member's look at
    ``released`` and its copy of the result."""

    operation: int = 0
    phase: str = "idle"
    record: int = 0
    heard: tuple[int, ...] = ()
    ways: str = ""  # by which each operation has ended: short, long or differs


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    pages: tuple[tuple[int, int], ...]  # of members: number of the operation, record
    released: tuple[int, ...]  # of leaders: number of the operation whose result the page holds
    between: Channels  # from leader to leader, unread: number of the operation, record; -1, -2: of the later phases
    everyone: Channels  # from rank to rank: number of the operation, record


class Broken(Exception):
    pass


def require(right: bool, what: str) -> None:
    if not right:
        raise Broken(what)


def put(row: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*row[:at], value, *row[at + 1 :])


class Protocol:
    """``nodes``: the ranks of each. ``operations``: how many follow each other. ``later``: the phases in which leaders
    move numbers once they agree, ``rest`` or ``shares`` or both. ``fault``: what is done wrong, to see that it is
    found."""

    def __init__(
        self, nodes: tuple[tuple[int, ...], ...], operations: int, later: tuple[str, ...] = (), fault: str = ""
    ):
        self.nodes, self.operations, self.fault = nodes, operations, fault
        self.phases = ("sums", *later)
        self.size = sum(map(len, nodes))
        self.node_of = [next(node for node in nodes if rank in node) for rank in range(self.size)]
        self.leaders = [node[0] for node in nodes]

    def begin(self) -> State:
        nothing: Channels = ((),) * self.size**2
        return State((Rank(),) * self.size, ((0, 0),) * self.size, (0,) * self.size, nothing, nothing)

    def steps(self, state: State, me: int) -> Iterator[State]:
        """What ``me`` may do next."""
        rank = state.ranks[me]
        leader = self.node_of[me][0]
        if rank.phase == "idle":
            if rank.operation < self.operations:
                for record in (0, 1):
                    begun = rank._replace(operation=rank.operation + 1, record=record, heard=())
                    yield self.announce(state, me, begun)
                    yield self.gather(state, me, begun)
        elif rank.phase == "long":
            yield from self.long_way(state, me, rank)
        elif rank.phase == "read":
            require(state.released[leader] == rank.operation, "a result is overwritten before a member has read it")
            yield self.ended(state, me, rank, "short")
        elif rank.phase == "page":
            if state.released[leader] == rank.operation:
                yield self.set(state, me, rank._replace(phase="read"))
            if self.taken(state, me, rank):
                yield self.announce(state, me, rank)
        elif rank.phase == "gather":
            yield from self.gathered(state, me, rank)
        else:
            yield from self.exchange(state, me, rank)

    def set(self, state: State, me: int, rank: Rank) -> State:
        return state._replace(ranks=put(state.ranks, me, rank))

    def gather(self, state: State, me: int, rank: Rank) -> State:
        """The short way begins."""
        leader = self.node_of[me][0]
        if me == leader:
            return self.set(state, me, rank._replace(phase="gather"))
        reads = state.ranks[leader]
        require(reads.phase != "adds", "numbers are overwritten that a leader reads")
        state = state._replace(pages=put(state.pages, me, (rank.operation, rank.record)))
        return self.set(state, me, rank._replace(phase="page"))

    def gathered(self, state: State, me: int, rank: Rank) -> Iterator[State]:
        pages = [state.pages[member] for member in self.node_of[me][1:]]
        if all(number == rank.operation for number, _ in pages):
            if all(record == rank.record for _, record in pages):
                yield self.set(state, me, rank._replace(phase="adds"))
            else:
                yield self.announce(state, me, rank)
        else:  # a member is late, or somebody takes the long way
            yield self.announce(state, me, rank)

    def exchange(self, state: State, me: int, rank: Rank) -> Iterator[State]:
        """A leader's part between leaders. ``heard``: those whose frame of this phase is here; ``~leader`` where
        it differs."""
        others = [leader for leader in self.leaders if leader != me]
        if rank.phase == "adds":
            state = self.send(state, me, others, (rank.operation, rank.record))
            if self.fault == "eager":
                state = self.send(state, me, others, (rank.operation, -1))
            yield self.set(state, me, rank._replace(phase="sums", heard=()))
            return
        phase = self.phases.index(rank.phase)
        if len(rank.heard) == len(others):
            if any(heard < 0 for heard in rank.heard):
                yield self.announce(state, me, rank)
                return
            if phase + 1 < len(self.phases):
                if self.fault != "eager":
                    state = self.send(state, me, others, (rank.operation, -phase - 1))
                yield self.set(state, me, rank._replace(phase=self.phases[phase + 1], heard=()))
            else:
                require(
                    all(state.ranks[member].phase != "read" for member in self.node_of[me][1:]),
                    "a result is overwritten that a member reads",
                )
                state = state._replace(released=put(state.released, me, rank.operation))
                yield self.ended(state, me, rank, "short")
            return
        for leader in others:
            at = leader * self.size + me
            if leader in rank.heard or ~leader in rank.heard or not state.between[at]:
                continue
            number, record = state.between[at][0]
            taken = state._replace(between=put(state.between, at, state.between[at][1:]))
            if number < rank.operation and self.fault != "skips nothing":
                require(record >= 0, "numbers are left over")
                yield taken
                continue
            require(number == rank.operation, "sums of another operation are taken for this one's")
            require(max(0, -record) == phase, "numbers of one phase are taken for those of another")
            heard = leader if record < 0 or record == rank.record else ~leader
            yield self.set(taken, me, rank._replace(heard=tuple(sorted((*rank.heard, heard)))))
        if self.taken(state, me, rank) or self.fault == "impatient":
            require(rank.phase == "sums", "a leader gives up where another may have all that it needs")
            yield self.announce(state, me, rank)

    def send(self, state: State, me: int, others: list[int], frame: tuple[int, int]) -> State:
        between = state.between
        for leader in others:
            at = me * self.size + leader
            between = put(between, at, (*between[at], frame))
        return state._replace(between=between)

    def taken(self, state: State, me: int, rank: Rank) -> bool:
        """``Engine::announced_by_others``."""
        first = [state.everyone[peer * self.size + me][:1] for peer in range(self.size)]
        return any(each and each[0][0] <= rank.operation for each in first)

    def announce(self, state: State, me: int, rank: Rank) -> State:
        """The long way begins, or is turned to."""
        for other in state.ranks:
            require(other.ways[rank.operation - 1 : rank.operation] != "s", "one turns where another has a result")
        everyone = state.everyone
        for peer in range(self.size):
            if peer != me:
                at = me * self.size + peer
                everyone = put(everyone, at, (*everyone[at], (rank.operation, rank.record)))
        return self.set(state._replace(everyone=everyone), me, rank._replace(phase="long", heard=()))

    def long_way(self, state: State, me: int, rank: Rank) -> Iterator[State]:
        at = [peer * self.size + me for peer in range(self.size) if peer != me]
        if not all(state.everyone[each] for each in at):
            return
        first = [state.everyone[each][0] for each in at]
        require(all(number == rank.operation for number, _ in first), "announcements of several operations meet")
        everyone = state.everyone
        for each in at:
            everyone = put(everyone, each, everyone[each][1:])
        agreed = all(record == rank.record for _, record in first)
        yield self.ended(state._replace(everyone=everyone), me, rank, "long" if agreed else "differs")

    def ended(self, state: State, me: int, rank: Rank, how: str) -> State:
        for peer in state.ranks:
            way = peer.ways[rank.operation - 1 : rank.operation]
            require(not way or way == how[0], "ranks end an operation by several ways")
            if how == "short":
                require(peer.operation >= rank.operation, "a result without a rank's numbers")
                if peer.operation == rank.operation:
                    require(peer.record == rank.record, "a result where ranks differ")
                    require(peer.phase != "long", "one has a result where another takes the long way")
        return self.set(state, me, rank._replace(phase="idle", heard=(), ways=rank.ways + how[0]))


def explored(protocol: Protocol) -> int:
    """How many states there are; Broken where one is wrong."""
    left = [protocol.begin()]
    seen = set(left)
    while left:
        state = left.pop()
        found = [after for me in range(protocol.size) for after in protocol.steps(state, me)]
        ended = all(rank.phase == "idle" and rank.operation == protocol.operations for rank in state.ranks)
        require(bool(found) or ended, f"nobody can go on: {state}")
        for after in found:
            if after not in seen:
                seen.add(after)
                left.append(after)
    return len(seen)


@pytest.mark.parametrize(
    ("nodes", "operations", "later"),
    [
        (((0, 1), (2, 3)), 1, ("rest",)),
        (((0,), (1,), (2, 3)), 1, ("rest", "shares")),
        (((0, 1), (2,)), 2, ()),
        (((0, 1), (2,)), 2, ("shares",)),
        (((0, 1), (2,)), 2, ("rest", "shares")),
    ],
)
def test_every_interleaving(nodes: tuple[tuple[int, ...], ...], operations: int, later: tuple[str, ...]) -> None:
    assert explored(Protocol(nodes, operations, later)) > 1000


@pytest.mark.parametrize(
    ("fault", "later", "what"),
    [
        ("impatient", (), "one has a result where another takes the long way|one turns where another has a result"),
        ("impatient", ("rest",), "a leader gives up where another may have all that it needs"),
        ("skips nothing", (), "sums of another operation"),
        ("eager", ("rest",), "numbers are left over"),
    ],
)
def test_what_is_wrong_is_found(fault: str, later: tuple[str, ...], what: str) -> None:
    with pytest.raises(Broken, match=what):
        explored(Protocol(((0, 1), (2,)), 2, later, fault))
