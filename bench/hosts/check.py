"""Do the emulated hosts keep their promises? ``python -m bench.cluster --check`` measures that.

Three promises: a byte stream is never faster than the link; the round trip is at least twice the delay; ranks on
different hosts do not talk through shared memory (an allreduce takes at least as long as its bytes need on the link).
The second half of this file runs on the hosts: ``python -m bench.hosts.check receive|send|allreduce ...``.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ..core.mpirun import Mpi
from .mpi import mpirun_across, rank_environment
from .namespaces import Cluster
from .plan import ClusterError

PORT = 29511
STREAM_S = 1.5
BLOCK_BYTES = 1 << 16
PINGS = 21
ALLREDUCE_BYTES = 10_000_000
ALLREDUCE_ROUNDS = 3
TIMEOUT_S = 120.0
HALF = 0.5  # of the rate: below it the machine is too busy to measure anything on these links


def measure_stream(
    cluster: Cluster, sender: int, receiver: int, seconds: float = STREAM_S
) -> tuple[float, float, float]:
    """Bytes that arrived, the seconds from the first of them to the last, and the median round trip in ms."""
    me = [sys.executable, "-m", "bench.hosts.check"]
    taking = cluster.start(receiver, [*me, "receive"], stdout=subprocess.PIPE)
    giving = cluster.start(sender, [*me, "send", cluster.addresses[receiver], str(seconds)], stdout=subprocess.PIPE)
    try:
        got = reply(taking, seconds)
        return got["bytes"], got["seconds"], reply(giving, seconds)["round_trip_ms"]
    finally:
        for process in (taking, giving):
            process.kill()
            process.communicate()


def reply(process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    out, _ = process.communicate(timeout=TIMEOUT_S + seconds)
    if process.returncode:
        raise ClusterError(f"{process.args!r} ended with exit code {process.returncode}")
    answer: dict[str, Any] = json.loads(out)
    return answer


def check(cluster: Cluster, mpi: Mpi) -> bool:
    """Measure and print all promises; whether they were kept."""
    link, hosts = cluster.link, len(cluster.names)
    arrived_bytes, seconds, round_trip_ms = measure_stream(cluster, 0, hosts - 1)
    least_s = link.least_time_s(arrived_bytes)
    share = arrived_bytes / seconds / link.bytes_per_s
    kept = verdict(
        seconds >= least_s and share >= HALF,
        f"stream host0 -> host{hosts - 1}: {arrived_bytes * 8 / seconds / 1e6:.1f} Mbit/s of payload, "
        f"{share:.1%} of the rate",
    )
    kept &= verdict(
        round_trip_ms >= 2 * link.delay_ms, f"round trip: {round_trip_ms:.3f} ms, delay 2 x {link.delay_ms:g} ms"
    )
    command = [sys.executable, "-m", "bench.hosts.check", "allreduce", str(ALLREDUCE_BYTES)]
    running = cluster.start(
        0, mpirun_across(mpi, cluster.names, 1, command), rank_environment(mpi, link), subprocess.PIPE
    )
    answer = reply(running, 0.0)
    sent_bytes = 2 * (hosts - 1) / hosts * ALLREDUCE_BYTES
    least_s = link.least_time_s(sent_bytes)
    kept &= verdict(
        answer["seconds"] >= least_s and answer["hosts"] == list(cluster.names) and not answer["wrong"],
        f"MPI_Allreduce of {ALLREDUCE_BYTES / 1e6:.0f} MB, {mpi.kind} {mpi.version}, {hosts} hosts: "
        f"{answer['seconds'] * 1e3:.0f} ms, possible on this link: {least_s * 1e3:.0f} ms; wrong {answer['wrong']}",
    )
    return kept


def verdict(kept: bool, line: str) -> bool:
    print(f"{'ok    ' if kept else 'BROKEN'} {line}", flush=True)
    return kept


def receive() -> dict[str, float]:
    """Answer pings, then count the stream until the sender closes it."""
    with socket.create_server(("", PORT)) as server:
        server.settimeout(TIMEOUT_S)
        stream, _ = server.accept()
    with stream:
        stream.settimeout(TIMEOUT_S)
        for _ in range(PINGS):
            stream.sendall(stream.recv(1))
        block = bytearray(16 * BLOCK_BYTES)
        arrived_bytes = stream.recv_into(block)
        first_s = last_s = time.perf_counter()
        while count := stream.recv_into(block):
            arrived_bytes += count
            last_s = time.perf_counter()
    return {"bytes": arrived_bytes, "seconds": last_s - first_s}


def send(address: str, seconds: float) -> dict[str, float]:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            stream = socket.create_connection((address, PORT), timeout=TIMEOUT_S)
            break
        except ConnectionRefusedError:  # the receiver is still starting
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
    with stream:
        round_trips_ms = []
        for _ in range(PINGS):
            start_s = time.perf_counter()
            stream.sendall(b"p")
            stream.recv(1)
            round_trips_ms.append((time.perf_counter() - start_s) * 1e3)
        end_s, block = time.perf_counter() + seconds, bytes(BLOCK_BYTES)
        while time.perf_counter() < end_s:
            stream.sendall(block)
    return {"round_trip_ms": statistics.median(round_trips_ms)}


def allreduce(count_bytes: int) -> dict[str, Any] | None:
    """On every rank: MPI_Allreduce of data that differs by rank and index; rank 0 answers."""
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    index = np.arange(count_bytes // 4, dtype=np.float32) % 1021
    mine, total = index + world.rank, np.empty_like(index)
    expected = index * world.size + world.size * (world.size - 1) // 2  # small integers: exact in fp32, in any order
    times_s, wrong = [], 0
    for _ in range(ALLREDUCE_ROUNDS + 1):  # the first one connects
        world.Barrier()
        start_s = time.perf_counter()
        world.Allreduce(mine, total)
        times_s.append(world.allreduce(time.perf_counter() - start_s, MPI.MAX))
        wrong += int(np.count_nonzero(total != expected))
    wrong = world.allreduce(wrong)
    names = world.gather(socket.gethostname())
    return {"seconds": min(times_s[1:]), "hosts": names, "wrong": wrong} if world.rank == 0 else None


if __name__ == "__main__":
    role, *values = sys.argv[1:]
    roles: dict[str, Callable[[], object]] = {
        "receive": receive,
        "send": lambda: send(values[0], float(values[1])),
        "allreduce": lambda: allreduce(int(values[0])),
    }
    if (result := roles[role]()) is not None:
        print(json.dumps(result))
