"""The group of all ranks: made once, used by every operation that is given no other."""

from __future__ import annotations

import atexit
import os

from ..errors import UsageError
from ..job import topology
from ..job.launch import detect, install_exception_hook
from ..transport.base import Transport
from .control import gather_bytes
from .group import Group
from .links import LINKS, open_links
from .nodes import open_nodes, open_window

TRANSPORTS = ("mpi", "torch")
WINDOWS = ("auto", "on", "off")

_world: Group | None = None


def init(
    transport: str = "mpi",
    nodes: str | None = None,
    timeout_s: float = 300.0,
    check: bool = True,
    window: str = "auto",
    links: str = "auto",
    iface: str | None = None,
    links_check: bool = True,
) -> Group:
    """Connect all ranks of the job and return their group. Collective; later calls return the same group.

    ``transport``: ``"mpi"`` (under mpirun) or ``"torch"`` (gloo; under mpirun or torchrun). Without a launcher: a group
    of one rank, which needs neither. ``nodes``: which ranks share a node, declared by hand
    (:func:`commlab.job.topology.declared`); default: ranks with one host name. ``timeout_s``: how long a silent peer is
    waited for. ``check``: compare operations between ranks first (in a window always). ``window``: share memory between
    ranks of a node: ``"auto"`` (where it can be had), ``"on"`` (an error where not) or ``"off"``. ``links``: what joins
    several nodes: ``"tcp"``, TCP connections of our own with a native engine; ``"mpi"``, the transport itself;
    ``"auto"`` times both and takes the faster (docs/links.md). ``iface``: the network interfaces that links use, by
    name, joined by commas. ``links_check``: what travels over links carries a checksum. From here on an unhandled
    exception in one rank ends all of them.
    """
    global _world
    if _world is not None:
        return _world
    if transport not in TRANSPORTS:
        raise UsageError(f"unknown transport {transport!r}; there are {', '.join(TRANSPORTS)}")
    if window not in WINDOWS:
        raise UsageError(f"unknown window {window!r}; there are {', '.join(WINDOWS)}")
    if links not in LINKS:
        raise UsageError(f"unknown links {links!r}; there are {', '.join(LINKS)}")
    if detect().launcher is not None:
        # While connecting, others wait already for a rank that fails; every launcher ends them when one leaves with an
        # error.
        install_exception_hook(os._exit)
    connected = _connect(transport, timeout_s)
    install_exception_hook(connected.abort)
    alone = topology.Topology((tuple(range(connected.size)),))
    group = Group(connected, alone, timeout_s)
    if connected.size > 1:
        # Gathered even when the nodes are declared, and always checked: arguments that differ between ranks are seen
        # here.
        arguments = f"node keys, for init(nodes={nodes!r}, check={check}, window={window!r}, links={links!r})"
        keys = [key.decode() for key in gather_bytes(group, topology.node_key().encode(), arguments)]
        found = topology.from_keys(keys) if nodes is None else topology.declared(nodes, connected.size)
        bound = [cores.decode() for cores in gather_bytes(group, topology.bound_cores().encode(), "cores")]
        chosen, links_reason = connected, "all ranks are on one node"
        if links == "tcp" or (links == "auto" and len(found.nodes) > 1):
            declared = Group(connected, found, timeout_s)
            chosen, links_reason = open_links(declared, links, iface, links_check)
            declared.progress.close()
        elif links == "mpi":
            links_reason = "as asked for"
        group.progress.close()
        cores = topology.cores_of_node(bound, found.nodes, connected.rank)
        group = Group(chosen, found, timeout_s, check, cores)
        group.links_reason = links_reason
        if window != "off":
            open_window(group) if len(found.nodes) == 1 else open_nodes(group)
        if window == "on" and group.window is None and group.node is None:
            raise UsageError(f"rank {group.rank}: a window was asked for and can't be had: {group.window_reason}")
    _world = group
    atexit.register(group.progress.close)
    return group


def _connect(transport: str, timeout_s: float) -> Transport:
    launch = detect()
    if launch.launcher is None:
        from ..transport.sim import SimNetwork

        return SimNetwork(1).transports()[0]
    if transport == "torch":
        from ..transport.rendezvous import store_for
        from ..transport.torchdist import TorchTransport

        return TorchTransport(store_for(launch, timeout_s), launch.rank, launch.size, timeout_s)
    if launch.launcher == "torchrun":
        raise UsageError(
            f"rank {launch.rank}: torchrun launched this job, which MPI knows nothing of; use transport 'torch'"
        )
    try:
        from ..transport.mpi import MpiTransport, library
    except ImportError as error:
        raise UsageError(
            f"rank {launch.rank}: transport mpi needs mpi4py and an MPI library ({error}); give commlab's "
            "checkout a pip install '.[mpich]', or use transport 'torch'"
        ) from error
    connected = MpiTransport()
    if connected.size != launch.size:
        raise UsageError(
            f"rank {launch.rank}: {launch.launcher} launched {launch.size} ranks, but MPI sees "
            f"{connected.size}: mpirun and mpi4py's "
            f"library ({library()}) belong to different MPIs; use the mpirun that was installed with it"
        )
    return connected


def resolve(group: Group | None) -> Group:
    """``group``, or the world. UsageError before :func:`init`."""
    if group is not None:
        return group
    if _world is None:
        raise UsageError("no group yet: call commlab.init() first")
    return _world


def shutdown() -> None:
    """Release the group of all ranks; :func:`init` may be called again. Collective."""
    global _world
    if _world is not None:
        group, _world = _world, None
        atexit.unregister(group.progress.close)
        group.leave()
        if group.size > 1:
            group.barrier()
        group.close()
