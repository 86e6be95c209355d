"""Where ranks meet before torch.distributed can connect them: the environment's store under torchrun, MPI under
mpirun."""

from __future__ import annotations

import socket
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from ..errors import UsageError
from ..job.launch import Launch


def store_for(launch: Launch, timeout_s: float) -> dist.Store:
    """The key-value store shared by all ranks. Collective.

    Under torchrun the one that it set up; under mpirun rank 0 opens one on a free port and tells the others over MPI.
    """
    timeout = timedelta(seconds=timeout_s)
    if launch.launcher is None:
        return dist.HashStore()
    if launch.launcher == "torchrun":
        store: dist.Store = next(iter(dist.rendezvous("env://", launch.rank, launch.size, timeout=timeout)))[0]
        return store
    try:
        from mpi4py import MPI
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
    comm.Bcast([address, MPI.BYTE], root=0)
    return server or join_store(bytes(address).rstrip(b"\0"), launch.size, timeout_s)


def open_store(size: int, timeout_s: float) -> tuple[dist.Store, bytes]:
    """A store for ``size`` ranks on a free port of this host, and the address that the others give to
    :func:`join_store`."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(_own_address(), 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
    return store, f"{store.host} {store.port}".encode()


def join_store(address: bytes, size: int, timeout_s: float) -> dist.Store:
    """The store that another rank opened."""
    host, port = address.decode().split()
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout, wait_for_workers=False)


def _own_address() -> str:
    """The address under which other hosts reach this one: of the interface that gloo was told to use, else of the host
    name, else of the interface that leads outside."""
    import os

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
