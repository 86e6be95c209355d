"""The group of all ranks: made once, used by every operation that is given no other."""

from __future__ import annotations

import atexit
import logging
import os
from contextlib import suppress
from functools import partial
from typing import Any

from ..errors import UsageError
from ..job import leaving, topology, watch
from ..job.launch import LONGEST_S, detect, install_exception_hook
from ..transport.base import Transport
from .connect import connect
from .control import gather_bytes
from .group import Group
from .links import LINKS, open_links
from .nodes import open_nodes, open_window

log = logging.getLogger("commlab")

TRANSPORTS = ("mpi", "torch")
WINDOWS = ("auto", "on", "off")

_DEFAULTS: dict[str, Any] = {
    "transport": "mpi",
    "nodes": None,
    "timeout_s": 300.0,
    "check": True,
    "window": "auto",
    "links": "auto",
    "iface": None,
    "links_check": True,
}

_world: Group | None = None
_arguments: dict[str, Any] = {}
"""What the world was made with."""
_forked = False
"""Whether this process was forked from a rank."""


def _in_child() -> None:
    """A child of a rank takes no part in the rank's groups, and must not end what the rank still needs."""
    global _world, _forked
    if _world is not None:
        _forked = True
        atexit.unregister(_world.progress.close)
        atexit.unregister(_leave)
        _world = None


os.register_at_fork(after_in_child=_in_child)


def init(
    transport: str | None = None,
    nodes: str | None = None,
    timeout_s: float | None = None,
    check: bool | None = None,
    window: str | None = None,
    links: str | None = None,
    iface: str | None = None,
    links_check: bool | None = None,
) -> Group:
    """Connect all ranks of the job and return their group. Collective. Where there is a group already it is returned;
    arguments that differ from those that it was made with are a UsageError then, and those that are left out (None)
    are no difference. After :func:`shutdown` it may be called again, as often as one likes.

    ``transport``: ``"mpi"`` (under mpirun; the default) or ``"torch"`` (gloo; under mpirun or torchrun). Without a
    launcher: a group of one rank, which needs neither. ``nodes``: which ranks share a node, declared by hand
    (:func:`commlab.job.topology.declared`); default: ranks with one host name. ``timeout_s``: how long a silent peer is
    waited for (default: 300), here too (5 s at least): PeerTimeoutError says which ranks have not come. ``check``:
    compare operations between ranks first (default: True; in a window always). ``window``: share memory between ranks
    of a node: ``"auto"`` (where it can be had; the default), ``"on"`` (an error where not) or ``"off"``. ``links``:
    what joins several nodes: ``"tcp"``, TCP connections of our own with a native engine; ``"mpi"``, the transport
    itself; ``"auto"`` (the default) times both and takes the faster (docs/links.md). ``iface``: the network interfaces
    that links use, by name, joined by commas. ``links_check``: what travels over links carries a checksum (default:
    True). From here on an unhandled exception in one rank ends all of them, and a rank that leaves is missed by those
    that wait for it.
    """
    global _world, _arguments
    everything = {
        "transport": transport,
        "nodes": nodes,
        "timeout_s": timeout_s,
        "check": check,
        "window": window,
        "links": links,
        "iface": iface,
        "links_check": links_check,
    }
    given = {name: value for name, value in everything.items() if value is not None}
    if _world is not None:
        other = [name for name, value in given.items() if value != _arguments[name]]
        if other:
            raise UsageError(
                f"rank {_world.rank}: commlab.init() was called before with "
                f"{', '.join(f'{name}={_arguments[name]!r}' for name in other)}, and now with "
                f"{', '.join(f'{name}={given[name]!r}' for name in other)}; call commlab.shutdown() on all ranks "
                "first, or leave the arguments out to get the group that there is"
            )
        return _world
    arguments = _DEFAULTS | given
    _require(arguments)
    if _forked:
        raise UsageError("this process was forked from a rank, and is none itself; start processes before init()")
    launch = detect()
    if launch.launcher is not None:
        # While connecting, others wait already for a rank that fails; every launcher ends them when one leaves with an
        # error.
        install_exception_hook(os._exit)
    connected = connect(arguments["transport"], launch, arguments["timeout_s"])
    install_exception_hook(connected.abort)
    group = _group(connected, arguments)
    _world, _arguments = group, arguments
    atexit.register(group.progress.close)
    return group


def _require(arguments: dict[str, Any]) -> None:
    """UsageError for arguments of :func:`init` that mean nothing."""
    if arguments["transport"] not in TRANSPORTS:
        raise UsageError(f"unknown transport {arguments['transport']!r}; there are {', '.join(TRANSPORTS)}")
    if arguments["window"] not in WINDOWS:
        raise UsageError(f"unknown window {arguments['window']!r}; there are {', '.join(WINDOWS)}")
    if arguments["links"] not in LINKS:
        raise UsageError(f"unknown links {arguments['links']!r}; there are {', '.join(LINKS)}")
    timeout_s = arguments["timeout_s"]
    if not (isinstance(timeout_s, (int, float)) and 0 < timeout_s <= LONGEST_S):
        raise UsageError(f"timeout_s={timeout_s!r}: give a number of seconds above 0, {LONGEST_S:g} (30 years) at most")


def _group(connected: Transport, arguments: dict[str, Any]) -> Group:
    """The group of all ranks: nodes found, cores counted, the watch begun, windows opened. Collective."""
    timeout_s, check, window, nodes, links, iface, links_check = (
        arguments[name] for name in ("timeout_s", "check", "window", "nodes", "links", "iface", "links_check")
    )
    alone = topology.Topology((tuple(range(connected.size)),))
    group = Group(connected, alone, timeout_s)
    if connected.size == 1:
        return group
    # Gathered even when the nodes are declared, and always checked: arguments that differ between ranks are seen here.
    words = f"node keys, for init({nodes=}, {check=}, {window=}, {links=}, {links_check=})"
    # A host's name is bytes, and may be text of no encoding.
    keys = gather_bytes(group, topology.node_key().encode(errors="surrogateescape"), words)
    hosts = topology.from_keys([key.decode(errors="surrogateescape") for key in keys])
    found = hosts if nodes is None else topology.declared(nodes, connected.size)
    bound = [
        cores.decode(errors="surrogateescape")
        for cores in gather_bytes(group, topology.bound_cores().encode(errors="surrogateescape"), "cores")
    ]
    watched = _watch(group, hosts)
    chosen, links_reason = connected, "as asked for" if links == "mpi" else "all ranks are on one node"
    if links == "tcp" or (links == "auto" and len(found.nodes) > 1):
        declared = Group(connected, found, timeout_s)
        chosen, links_reason = open_links(declared, links, iface, links_check)
        declared.progress.close()
    group.progress.close()
    cores = topology.cores_of_node(bound, found.nodes, connected.rank)
    group = Group(chosen, found, timeout_s, check, cores)
    group.links_reason = links_reason
    group.observe(watched, range(connected.size))
    if window != "off":
        open_window(group) if len(found.nodes) == 1 else open_nodes(group)
    if window == "on" and group.window is None and group.node is None:
        raise UsageError(f"rank {group.rank}: a window was asked for and can't be had: {group.window_reason}")
    return group


def resolve(group: Group | None) -> Group:
    """``group``, or the world. UsageError before :func:`init`."""
    if group is not None:
        if not isinstance(group, Group):
            raise UsageError(f"group must be a commlab.Group, or None for all ranks, and not a {type(group).__name__}")
        return group
    if _world is None:
        raise UsageError("no group yet: call commlab.init() first")
    return _world


def shutdown() -> None:
    """Release the group of all ranks; :func:`init` may be called again. Collective; a group that an error has ended is
    released without waiting for anybody."""
    global _world
    if _world is not None:
        group, _world = _world, None
        atexit.unregister(group.progress.close)
        group.leave()
        if group.size > 1 and group.progress.ended is None:
            with suppress(UsageError):  # MPI was finalized: nobody can be waited for
                group.barrier()
        group.close()
        _forget(group)


def _watch(group: Group, hosts: topology.Topology) -> watch.Watch:
    """Begin to watch who leaves, and to tell the others when this rank does. Collective."""
    from ..transport.rendezvous import own_address

    made, reasons = watch.meet(group.rank, hosts.nodes, own_address, partial(gather_bytes, group))
    if reasons and group.rank == 0:
        log.info("a rank that leaves is seen only by a part of the others, and missed by the rest: %s", reasons[0])
    leaving.observe()
    atexit.register(_leave, made, group.transport)
    return made


def _leave(made: watch.Watch, connected: Transport) -> None:
    made.leave(leaving.exit_words())
    let_go = getattr(connected, "let_go", None)
    if let_go is not None:
        let_go()


def _forget(group: Group) -> None:
    """End the watch: all ranks are through with each other."""
    if group.watch is not None:
        atexit.unregister(_leave)
        group.watch.close()
        leaving.forget()
