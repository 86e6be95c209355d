"""Where ranks meet before torch.distributed can connect them: the environment's store under torchrun, MPI under
mpirun."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ..errors import PeerLostError, PeerTimeoutError, UsageError
from ..job.launch import Launch

_stores: dict[tuple[str, int], dist.Store] = {}
"""The environment's stores, kept: rank 0's own serves all jobs of this process, one after the other."""


def store_for(launch: Launch, timeout_s: float) -> dist.Store:
    """The key-value store shared by all ranks. Collective; PeerTimeoutError after ``timeout_s``.

    Under torchrun the one that it set up; under mpirun rank 0 opens one on a free port and tells the others over MPI.
    """
    if launch.launcher is None:
        return dist.HashStore()
    if launch.launcher == "torchrun":
        return _environment_store(launch, timeout_s)
    try:
        from mpi4py import MPI

        from .mpi import finish
    except ImportError as error:
        raise UsageError(
            f"rank {launch.rank}: transport torch was launched by {launch.launcher} and meets "
            "over MPI, but mpi4py is missing "
            f"({error}); install it, or launch with torchrun"
        ) from error
    comm = MPI.COMM_WORLD
    address = bytearray(256)
    server: dist.Store | None = None
    if comm.rank == 0:
        server, text = open_store(launch.size, timeout_s)
        address[: len(text)] = text
    try:
        finish(comm.Ibcast([address, MPI.BYTE], root=0), timeout_s)
    except PeerTimeoutError as error:
        raise PeerTimeoutError(
            f"rank {launch.rank} has waited {timeout_s:g} s in commlab.init() for rank 0; every rank must call it"
        ) from error
    return server or join_store(bytes(address).rstrip(b"\0"), launch.size, timeout_s)


def _environment_store(launch: Launch, timeout_s: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT: torchrun's own, or else rank 0 opens it."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"rank {launch.rank}: RANK={launch.rank} and WORLD_SIZE={launch.size} are set, but MASTER_ADDR={host!r} "
            f"and MASTER_PORT={port!r} are not where ranks could meet; launch with torchrun, which sets all four, or "
            "unset RANK and WORLD_SIZE for one process alone"
        )
    where = host, int(port)
    if where not in _stores:
        opens = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        since_s = time.monotonic()
        try:
            if not opens:
                until_open(*where, timeout_s)
            # Several in one process: torch's own init_process_group may open one there too.
            _stores[where] = dist.TCPStore(
                *where,
                launch.size,
                opens,
                timedelta(seconds=max(1.0, timeout_s - (time.monotonic() - since_s))),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (RuntimeError, TimeoutError) as error:
            if opens:
                raise UsageError(
                    f"rank 0 can't open its store at MASTER_ADDR:MASTER_PORT {host}:{port}: {error}; choose another "
                    "port"
                ) from error
            raise PeerTimeoutError(
                f"rank {launch.rank} has waited {timeout_s:g} s in commlab.init() for rank 0, which opens the store at "
                f"{host}:{port}; every rank must call it ({error})"
            ) from error
    return _stores[where]


def until_open(host: str, port: int, timeout_s: float) -> None:
    """Return once somebody listens at ``host:port``; TimeoutError after ``timeout_s``. torch's client asks there again
    and again, each time from another port of the system's choice. Where ``port`` is one of those, it asks from ``port``
    itself in the end, has connected to itself then, and waits for ever."""
    stop_s, pause_s = time.monotonic() + timeout_s, 1e-3
    while True:
        error: Exception | None = None
        try:
            for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                try:
                    with socket.socket(family, kind) as probe:
                        probe.bind(("", 0))
                        if probe.getsockname()[1] != port:
                            probe.settimeout(min(5.0, max(0.1, stop_s - time.monotonic())))
                            probe.connect(address)
                            return
                except OSError as refused:
                    error = refused
        except OSError as unknown:
            error = unknown
        if time.monotonic() > stop_s:
            raise TimeoutError(str(error)) from error
        time.sleep(pause_s)
        pause_s = min(0.1, 1.5 * pause_s)


def everyone_at(store: dist.Store, prefix: str, rank: int, size: int, timeout_s: float) -> None:
    """Return once all ranks are here: each leaves a key under ``prefix``. PeerTimeoutError, with the ranks that have
    not come, after ``timeout_s``."""
    keys = [f"{prefix}/here/{peer}" for peer in range(size)]
    store.set(keys[rank], "here")
    since_s = time.perf_counter()
    try:
        while not store.check(keys):
            waited_s = time.perf_counter() - since_s
            if waited_s > timeout_s:
                missing = [str(peer) for peer, key in enumerate(keys) if not store.check([key])]
                raise PeerTimeoutError(
                    f"rank {rank} has waited {waited_s:.1f} s in commlab.init() for rank"
                    f"{'s' if len(missing) > 1 else ''} {', '.join(missing)}; every rank must call it. See the other "
                    "ranks' output, or raise timeout_s"
                )
            time.sleep(min(0.1, max(1e-3, waited_s / 10)))
    except dist.DistError as error:
        raise PeerLostError(f"rank {rank}: the store where ranks meet is gone, in commlab.init(): {error}") from error


def open_store(size: int, timeout_s: float) -> tuple[dist.Store, bytes]:
    """A store for ``size`` ranks on a free port of this host, and the address that the others give to
    :func:`join_store`."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(own_address(), 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
    return store, f"{store.host} {store.port}".encode()


def join_store(address: bytes, size: int, timeout_s: float) -> dist.Store:
    """The store that another rank opened."""
    host, port = address.decode().split()
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout, wait_for_workers=False)


def own_address() -> str:
    """The address under which other hosts reach this one: of the interface that gloo was told to use, else of the host
    name, else of the interface that leads outside."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        import fcntl
        import struct

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", interface.split(",")[0].encode()[:15])
            siocgifaddr = 0x8915
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), siocgifaddr, request)[20:24])
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if address.startswith("127."):
        # Many systems know their own name as 127.0.1.1, where other hosts find nobody. Nothing is sent here: the kernel
        # only says which of its addresses it would send from.
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            address = probe.getsockname()[0]
    return address
