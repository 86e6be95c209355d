"""Links when something goes wrong: a byte is changed, a rank dies, ranks disagree, an operation is given up."""

from __future__ import annotations

import gc
import os
import signal
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch
from closed_form import expected, numbers
from linked import Mesh, on_all, wait_for

import commlab
from commlab.errors import CommlabError, DisagreementError, PeerLostError
from commlab.native.library import built
from commlab.runtime.group import Group
from commlab.transport.tcp import Links, missing_reason

pytestmark = pytest.mark.skipif(bool(missing_reason()), reason=missing_reason())


def crc(data: bytes) -> int:
    assert built is not None
    return int(built.crc32c(data, 0))


class Wire:
    """A rank whose only peer, rank 1, is this test by hand. A context: the test's end is closed at its end."""

    def __init__(self, checks: bool = True):
        end, self.socket = socket.socketpair()
        self.links = Links(0, [-1, end.detach()], checks)
        self.transport = self.links.world()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, channel: int, sequence: int, payload: bytes, spoil: int | None = None, check: bool = True) -> None:
        head = struct.pack("<III", channel, sequence, len(payload))
        frame = bytearray(head + struct.pack("<I", crc(payload) ^ crc(head) if check else 0) + payload)
        if spoil is not None:
            frame[spoil] ^= 0x10
        self.socket.sendall(frame)


MESSAGES = 1
"""The channel of the messages of group 0."""


@pytest.mark.parametrize("spoil", [*range(16), 16, 20, 415])
def test_a_changed_byte_is_never_a_number(spoil: int) -> None:
    """Kind: a corrupted byte, anywhere in a frame: an error that names both ranks."""
    with Wire() as wire:
        arrived = np.zeros(400, np.uint8)
        request = wire.transport.irecv(arrived, 1)
        wire.send(MESSAGES, 0, bytes(range(200)) * 2, spoil)
        wire.socket.shutdown(socket.SHUT_WR)  # a changed channel makes it a frame that nobody asked for
        # A changed length is a disagreement on sizes, where it is not seen to be impossible.
        with pytest.raises((PeerLostError, DisagreementError), match="rank 1"):
            wait_for(request, 5)


def test_without_checksums() -> None:
    with Wire(checks=False) as wire:
        arrived = np.zeros(4, np.uint8)
        request = wire.transport.irecv(arrived, 1)
        wire.send(MESSAGES, 0, b"abcd", check=False)
        wait_for(request)
        assert arrived.tobytes() == b"abcd"


def test_a_frame_of_another_size_is_a_disagreement() -> None:
    """Kind: what does not fit is an error with both sides, not a wrong sum; and the other ranks are told."""
    mesh = Mesh(3)
    short, long = np.zeros(40, np.uint8), np.zeros(44, np.uint8)
    zero, one, two = mesh.transports
    requests = [zero.irecv(short, 1), one.isend(long, 0), two.irecv(short, 0)]
    for rank in (0, 2):
        with pytest.raises(DisagreementError, match="rank 1 sent 44 bytes where rank 0 expected 40"):
            wait_for(requests[rank], 5)
    mesh.close()


def test_disagreement_names_all_sides_and_the_group_goes_on() -> None:
    mesh = Mesh(3)
    groups = mesh.groups()

    def work(group: Group) -> torch.Tensor:
        with pytest.raises(DisagreementError, match=r"rank 1: allreduce #1 of float32\[7\]"):
            commlab.allreduce(torch.ones(7 if group.rank == 1 else 9), "sum", group=group)
        return commlab.allreduce(torch.full((70_001,), float(group.rank)), "sum", group=group)

    for result in on_all(groups, work):
        assert isinstance(result, torch.Tensor), result
        assert (result == 3).all()
    mesh.close()


def test_operations_launched_ahead_keep_their_order() -> None:
    """Kind: progress without hooks. Ten operations in flight, small ones, programs and records; none waits for Python
    to be asked."""
    mesh = Mesh(3)
    groups = mesh.groups()

    def work(group: Group) -> None:
        tensors = [numbers(group.rank, numel, torch.float32) for numel in (3, 50_001, 1, 2_001, 120_000, 17, 40_000, 5)]
        handles = [commlab.allreduce_async(tensor, "sum", group=group) for tensor in tensors]
        part = torch.empty((4, 3, 3)[group.rank])
        commlab.reduce_scatter(part, torch.arange(10.0), "sum", group=group)
        group.barrier()
        for handle, tensor in zip(reversed(handles), reversed(tensors), strict=True):
            assert torch.equal(handle.wait(), expected("sum", 3, tensor.numel(), torch.float32))

    assert on_all(groups, work) == [None] * 3
    mesh.close()


def test_progress_needs_no_call() -> None:
    """Kind: progress during backward without hooks: who computes and calls nothing still takes part."""
    mesh = Mesh(2)
    groups = mesh.groups()
    tensors = [numbers(rank, 300_000, torch.float32) for rank in range(2)]
    for group, tensor in zip(groups, tensors, strict=True):
        commlab.allreduce_async(tensor, "sum", name="ahead", group=group)
    want = expected("sum", 2, 300_000, torch.float32)
    deadline_s = time.monotonic() + 20
    while not all(torch.equal(tensor, want) for tensor in tensors) and time.monotonic() < deadline_s:
        time.sleep(0.005)
    assert all(torch.equal(tensor, want) for tensor in tensors)
    mesh.close()


def test_an_operation_given_up_leaves_the_memory_alone() -> None:
    """The caller drops what it waits for, and the memory with it: the engine writes there no more, and the group says
    why it is of no more use."""
    mesh = Mesh(2)
    memory = np.zeros(1000, np.uint8)
    request = mesh.transports[0].irecv(memory, 1)
    del request
    gc.collect()
    sent = mesh.transports[1].isend(np.full(1000, 7, np.uint8), 0)
    wait_for(sent)
    with pytest.raises(CommlabError, match="abandoned"):
        wait_for(mesh.transports[0].irecv(memory, 1), 5)
    assert not memory.any()
    mesh.close()


def test_messages_of_two_groups_may_come_in_any_order() -> None:
    """Rank 0 asks group A's message first, rank 1 sends group B's first: neither waits for the other in a circle."""
    mesh = Mesh(2)
    splits = on_all(mesh.transports, lambda transport: (transport.split([0, 1], 1), transport.split([1, 0], 2)))
    (a0, b0), (a1, b1) = splits  # type: ignore[misc]
    long, short = np.arange(3_000_000, dtype=np.uint8), np.arange(9, dtype=np.uint8)
    got_long, got_short = np.zeros_like(long), np.zeros_like(short)
    sends = [b1.isend(long, b1.size - 1 - b1.rank), a1.isend(short, 0)]
    request = a0.irecv(got_short, 1)
    late = b0.irecv(got_long, b0.size - 1 - b0.rank)
    wait_for(request)
    wait_for(late)
    for send in sends:
        wait_for(send)
    assert (got_short == short).all() and (got_long == long).all()
    mesh.close()


def test_a_rank_that_leaves_in_good_order_hurts_nobody_who_is_done() -> None:
    mesh = Mesh(3)
    groups = mesh.groups()
    assert on_all(groups, Group.barrier) == [None] * 3
    mesh.links[2].engine.leave(1.0)
    assert on_all(mesh.transports[:2], lambda transport: transport.isend(np.zeros(3, np.uint8), 1 - transport.rank))
    with pytest.raises(PeerLostError, match="rank 2: it has left"):
        wait_for(mesh.transports[0].irecv(np.zeros(3, np.uint8), 2), 5)
    mesh.close()


@pytest.mark.parametrize("moment_s", [0.0, 0.004, 0.012])
def test_a_killed_rank_is_named_by_all(moment_s: float) -> None:
    """Kind: kill -9 of one of 4 ranks in the middle of a long operation: all others raise, and name it. (How fast is
    measured in docs/links.md; no timing decides a test.)"""
    mesh = Mesh(4)
    groups = mesh.groups()
    handles = [
        commlab.allreduce_async(torch.ones(4_000_000), "sum", algorithm="ring", group=group) for group in groups[:3]
    ]
    time.sleep(moment_s)
    for end in mesh.sockets[3][:3]:
        # What the kernel does for a process that is killed.
        with socket.socket(fileno=os.dup(end)) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
    for rank, handle in enumerate(handles):
        with pytest.raises(PeerLostError, match=f"rank {rank}: the links lost rank 3.*allreduce #1"):
            handle.wait(20)
    mesh.close()


def test_a_child_keeps_no_connection_open() -> None:
    """A forked worker must not keep its dead parent's connections alive."""
    end, other = socket.socketpair()
    links = Links(0, [-1, end.detach()])
    child = os.fork()
    if child == 0:
        threading.Event().wait(30)
        os._exit(0)
    links.engine.leave(0.5)
    other.settimeout(10)
    frame = other.recv(64)
    assert len(frame) == 16, "it says that it leaves"
    assert other.recv(64) == b"", "the child holds the connection"
    other.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
