"""Links when a connection ends without notice: only who still awaits something of the lost rank fails, and nobody waits
for ever. The peers are sockets that the tests read and write by hand, so that the order of all events is the test's."""

from __future__ import annotations

import os
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from link_peers import (
    BROKEN,
    CONTROL,
    LOST,
    MESSAGES,
    OPERATIONS,
    RECORD,
    REDUCE,
    SEND,
    WRITE,
    Job,
    lost,
    pending,
)
from linked import Mesh, wait_for

import commlab
from commlab.errors import DisagreementError, PeerLostError
from commlab.job.topology import Topology
from commlab.runtime.group import Group
from commlab.runtime.programs import few_launch
from commlab.transport.tcp import Links, missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())


@pytest.fixture
def job() -> Iterator[Job]:
    made = Job()
    yield made
    made.close()


def test_who_ends_after_its_last_exchange_hurts_nobody(job: Job) -> None:
    """Kind: os._exit() after an operation that others still complete. Nobody is told of a loss that hurt nobody."""
    exchange = job.transport.exchange(RECORD)
    job.two.say(MESSAGES, RECORD)
    job.two.end()
    assert pending(exchange)
    job.one.say(MESSAGES, RECORD)
    wait_for(exchange)
    assert exchange.records() == [RECORD] * 3
    wait_for(job.transport.isend(np.frombuffer(RECORD, np.uint8), 1))
    assert job.one.silent()
    # Whoever does need it fails, and tells.
    lost(job.transport.exchange(RECORD), 2)
    assert job.one.heard_words() == (LOST, (0, 2))
    lost(job.transport.irecv(np.zeros(4, np.uint8), 1), 2)
    assert job.one.silent()


def test_few_numbers_of_a_rank_that_has_ended(job: Job) -> None:
    numbers = torch.ones(4)
    request = job.transport.launch(RECORD, few_launch(numbers, (16, False), "sum", 1, 2))
    job.two.say(OPERATIONS, RECORD + np.full(4, 5, np.float32).tobytes())
    job.two.end()
    assert pending(request)
    job.one.say(OPERATIONS, RECORD + np.full(4, 3, np.float32).tobytes())
    wait_for(request)
    assert (numbers == 9).all()


def test_numbers_that_came_before_anybody_could_take_them(job: Job) -> None:
    """Kind: the sum adds rank 1's numbers first. Rank 2's, of two frames, are there, but it has ended."""
    numel = 100_000
    numbers = torch.ones(numel)
    request = job.rows(numbers, (REDUCE, 1), (REDUCE, 2))
    theirs = np.full(numel, 5, np.float32).tobytes()
    frames = theirs[: 256 * 1024], theirs[256 * 1024 :]
    for frame in frames:
        job.two.say(OPERATIONS, frame)
    job.two.end()
    assert pending(request)
    assert list(request.peers()) == [1], "rank 2 owes nothing any more"
    for frame in frames:
        job.one.say(OPERATIONS, frame)
    wait_for(request)
    assert (numbers == 11).all()


@pytest.mark.parametrize("cut", [15, 16, 20, 16 + 399])
def test_half_a_frame_is_no_number(job: Job, cut: int) -> None:
    numbers = torch.ones(100)
    request = job.rows(numbers, (REDUCE, 1), (REDUCE, 2))
    job.two.say(OPERATIONS, bytes(400), cut=cut)
    job.two.end()
    lost(request, 2)


def test_a_message_outlives_its_sender(job: Job) -> None:
    """Kind: receives that are posted later, one for what was sent and one for what was not."""
    job.two.say(MESSAGES, b"last words")
    job.two.end()
    silent = job.transport.irecv(np.zeros(1, np.uint8), 1)
    assert pending(silent)
    arrived = np.zeros(10, np.uint8)
    wait_for(job.transport.irecv(arrived, 2))
    assert arrived.tobytes() == b"last words"
    lost(job.transport.irecv(arrived, 2), 2)


def test_what_is_to_be_sent_to_a_rank_that_has_ended(job: Job) -> None:
    job.two.end()
    lost(job.transport.isend(np.zeros(10, np.uint8), 2), 2)
    assert job.one.heard_words() == (LOST, (0, 2))


def test_a_later_row_of_the_program_needs_the_rank(job: Job) -> None:
    """Kind: a send that is not ready yet. Nobody waits for rank 1's numbers first."""
    request = job.rows(torch.ones(100), (REDUCE, 1), (SEND, 2))
    job.two.end()
    lost(request, 2)


@pytest.mark.parametrize("row", [(SEND, 2), (WRITE, 2)])
def test_who_has_announced_and_died_is_named_before_all_have_announced(job: Job, row: tuple[int, int]) -> None:
    """Kind: rank 1 computes, and may announce the operation only much later."""
    request = job.rows(torch.ones(100), (REDUCE, 1), row, record=RECORD)
    job.two.say(OPERATIONS, RECORD)
    job.two.end()
    lost(request, 2)


@pytest.mark.parametrize("share_bytes", [8, 16])
def test_shares_of_a_rank_that_announced_and_died(job: Job, share_bytes: int) -> None:
    """Kind: what this rank reduces is to be sent to it; or, where this rank has no share, its share is to come."""
    request = job.transport.launch(RECORD, few_launch(torch.ones(4), (share_bytes, True), "sum", 1, 2))
    job.two.say(OPERATIONS, RECORD + bytes(share_bytes))
    job.two.end()
    lost(request, 2)


def test_who_has_announced_and_sent_all_is_not_needed(job: Job) -> None:
    numbers = torch.ones(100)
    request = job.rows(numbers, (REDUCE, 1), (WRITE, 2), record=RECORD)
    job.two.say(OPERATIONS, RECORD)
    job.two.say(OPERATIONS, np.full(100, 7, np.float32).tobytes())
    job.two.end()
    assert pending(request)
    job.one.say(OPERATIONS, RECORD)
    job.one.say(OPERATIONS, bytes(400))
    wait_for(request)
    assert (numbers == 7).all()


def test_who_announced_another_operation_and_ended_is_in_the_disagreement(job: Job) -> None:
    """Kind: rank 2 has raised DisagreementError and ended, before all ranks have announced."""
    request = job.rows(torch.ones(100), (REDUCE, 1), (SEND, 2), record=RECORD)
    job.two.say(OPERATIONS, RECORD[::-1])
    job.two.end()
    assert pending(request)
    job.one.say(OPERATIONS, RECORD)
    wait_for(request)
    assert not request.agreed(RECORD)


def test_who_waits_for_one_who_waited_for_the_dead(job: Job) -> None:
    """Kind: transitive. Rank 1 fails of the loss of rank 2, which this rank does not need: it names rank 2."""
    request = job.rows(torch.ones(100), (WRITE, 1), (WRITE, 1))
    job.one.say(OPERATIONS, bytes(400))
    assert pending(request)
    job.one.tell(LOST, 0, 2, text=b"a cable was cut")
    lost(request, 2, "a cable was cut")
    assert job.two.heard_words() == (LOST, (0, 2))


def test_who_waits_for_nothing_of_those_who_failed_goes_on(job: Job) -> None:
    request = job.rows(torch.ones(100), (WRITE, 2), (WRITE, 2))
    job.one.tell(LOST, 0, 1, text=b"it fails of itself")
    assert pending(request)
    job.two.say(OPERATIONS, bytes(400))
    job.two.say(OPERATIONS, bytes(400))
    wait_for(request)
    lost(job.rows(torch.ones(100), (SEND, 2), (WRITE, 1)), 1)


def test_words_do_not_overtake_numbers(job: Job) -> None:
    """Kind: rank 2's numbers are in the socket when rank 1's words come, which say that it is lost."""
    job.one.tell(LOST, 0, 2, text=b"no cable")
    job.two.say(MESSAGES, b"abcd")
    job.two.say(MESSAGES, b"efgh")
    first, second = np.zeros(4, np.uint8), np.zeros(4, np.uint8)
    requests = [job.transport.irecv(first, 2), job.transport.irecv(second, 2)]
    for request in requests:
        wait_for(request)
    assert first.tobytes() + second.tobytes() == b"abcdefgh"
    lost(job.transport.irecv(first, 2), 2, "no cable")


def test_one_that_others_have_given_up(job: Job) -> None:
    """Kind: rank 1 has closed a connection that corrupts, and says so; rank 2 is not hurt."""
    awaited = job.transport.irecv(np.zeros(4, np.uint8), 2)
    job.one.tell(LOST, 0, 0, text=b"a wrong checksum")
    assert pending(awaited)
    lost(job.transport.irecv(np.zeros(4, np.uint8), 1), 1, "rank 1 has given this rank up: a wrong checksum")
    assert job.two.heard_words() == (LOST, (0, 1))


def test_a_loss_that_hurt_another_group(job: Job) -> None:
    """Kind: words are about one group; whoever then ends is named by the loss of which it told."""
    other = job.transport.split([0, 1, 2], 7)
    assert other is not None
    exchange = job.transport.exchange(RECORD)
    job.one.tell(LOST, 7, 2, text=b"no cable")
    job.two.say(MESSAGES, RECORD)
    job.two.end()
    assert pending(exchange)
    lost(other.exchange(RECORD), 2, "no cable")
    job.one.end()
    lost(exchange, 2, "no cable")


def test_one_that_told_of_a_rank_that_left_in_good_order_is_named_itself(job: Job) -> None:
    """Kind: rank 1 has given up a receive that rank 2 left unanswered at its end, and is killed much later."""
    exchange = job.transport.exchange(RECORD)
    job.two.say(MESSAGES, RECORD)
    job.two.say(CONTROL, b"", sequence=1)
    job.two.end()
    job.one.tell(LOST, 7, 2, text=b"it has left")
    assert pending(exchange)
    job.one.end()
    lost(exchange, 1)


@pytest.mark.parametrize("kind", [LOST, BROKEN])
def test_words_about_a_group_that_is_made_later(job: Job, kind: int) -> None:
    """Kind: rank 1 made the group, began an operation and failed before this rank has made it."""
    job.one.tell(kind, 7, *([2] if kind == LOST else []), text=b"this is why")
    looking = job.transport.irecv(np.zeros(4, np.uint8), 1)
    assert pending(looking)
    other = job.transport.split([0, 1, 2], 7)
    assert other is not None
    with pytest.raises(PeerLostError if kind == LOST else DisagreementError, match="this is why"):
        wait_for(other.exchange(RECORD), 5)


def test_a_group_that_is_made_after_the_loss(job: Job) -> None:
    """A group with a lost rank works among the others."""
    job.two.end()
    looking = job.transport.irecv(np.zeros(4, np.uint8), 1)
    assert pending(looking)
    other = job.transport.split([2, 1, 0], 7)
    assert other is not None
    sent = other.isend(np.frombuffer(b"abcd", np.uint8), 1)
    wait_for(sent)
    assert job.one.heard() == (15, 0, b"abcd")
    with pytest.raises(PeerLostError, match="the links lost rank 0: its end of the connection was closed"):
        wait_for(other.exchange(RECORD), 5)


@pytest.mark.parametrize("words", [(LOST, 0, 9), (LOST, 7, 3), (LOST, 0), (BROKEN,), (9, 0)])
def test_words_that_mean_nothing_end_the_connection(job: Job, words: tuple[int, ...]) -> None:
    request = job.transport.irecv(np.zeros(4, np.uint8), 1)
    kind, *numbers = words
    job.one.say(CONTROL, struct.pack(f"<{len(numbers)}I", *numbers), kind)
    lost(request, 1)


def forked_rank(mesh: Mesh, rank: int, work: Callable[[Group], object]) -> int:
    """The process of a rank of ``mesh`` that is absent here: does ``work`` and ends without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        for end in mesh.sockets[rank]:
            if end >= 0:
                os.close(end)
        return pid
    signal.alarm(60)
    try:
        nodes = Topology(tuple((each,) for each in range(mesh.size)))
        work(Group(Links(rank, mesh.sockets[rank]).world(), nodes, 20.0))
    finally:
        os._exit(0)


@pytest.mark.parametrize("round_", range(12))
def test_who_raises_and_leaves_at_once_is_not_taken_for_the_lost(round_: int) -> None:
    """Rank 2 is killed in the middle of long frames, rank 1 raises and ends in a hurry: rank 0 names rank 2."""
    mesh = Mesh(3, narrow=True, absent=2)
    killed = forked_rank(mesh, 2, lambda group: commlab.allreduce(torch.ones(1_000_000), group=group))
    handles = [commlab.allreduce_async(torch.ones(1_000_000), group=group) for group in mesh.groups()]
    time.sleep(0.002 * (round_ % 6))
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(PeerLostError, match="lost rank 2"):
        handles[1].wait(20)
    mesh.links[1].engine.leave(0.0)
    with pytest.raises(PeerLostError, match="lost rank 2"):
        handles[0].wait(20)
    os.waitpid(killed, 0)
    mesh.close()
