"""The job as Horovod's programs see it: init and shutdown, ranks, process sets, and the engine behind them."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ..c10d.connect import Member, connect
from ..errors import UsageError
from ..job.launch import Launch, detect, install_exception_hook
from ..runtime.connect import import_mpi
from ..runtime.group import Group
from ..transport.rendezvous import store_for
from . import timeline
from .announcement import Announcement
from .background import Background
from .process_sets import ProcessSet, global_process_set
from .settings import settings_of_environment
from .submission import Submission

_SHUTDOWN_S = 5.0
"""So long shutdown() waits for the other ranks to call it too; a rank that waits for this one learns of it then."""
_EXIT_S = 1.0


class World:
    """What one :func:`init` has made. ``group``: all ranks of the job; its operations are the engine's."""

    def __init__(self, engine: Background, group: Group, store: Any, here: Member):
        self.engine, self.group, self.store, self.here = engine, group, store, here
        self.sets: dict[int, ProcessSet] = {0: global_process_set}
        self._numbers = itertools.count(1)
        self._named: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()

    def next_name(self, number: int, kind: str) -> str:
        """A name for an operation that was given none: how many of its kind there were in its process set."""
        with self._lock:
            count = self._named[number, kind] = self._named.get((number, kind), 0) + 1
        return f"{kind}.noname.{count}"

    def counters(self) -> dict[str, int]:
        """How many operations of all ranks were given a name here, by kind."""
        with self._lock:
            return {kind: count for (number, kind), count in self._named.items() if number == 0}

    def count_from(self, counters: dict[str, int]) -> None:
        """Go on from what all ranks have agreed on."""
        with self._lock:
            self._named.update({(0, kind): count for kind, count in counters.items()})

    def agree(self, what: str, ranks: Sequence[int]) -> int:
        """All ranks of the job want ``what`` for the process set of ``ranks``; the same new number on all of them."""
        request = Announcement(what, f"{what} of ranks {list(ranks)}", detail=f"ranks {list(ranks)}", named=False)
        submission = Submission(request, finish=lambda _: next(self._numbers))
        self.engine.submit(0, [submission])
        self.engine.urge(0, submission)
        return int(submission.result())


_world: World | None = None
_generation = 0
_store: dist.Store | None = None
"""The store of an MPI job, kept for the next :func:`init`."""


def require() -> World:
    """The world. UsageError before :func:`init`."""
    if _world is None:
        raise UsageError("Horovod has not been initialized; use hvd.init().")
    return _world


def init(comm: Any = None, process_sets: Any = None, *, timeout_s: float | None = None) -> None:
    """Connect the ranks of the job and start the engine's thread, which sleeps until there is something to do.
    Collective. A second call does nothing.

    ``comm``: None for all ranks, or a list of ranks, or an mpi4py communicator: then those are the job, and each other
    rank is a job of its own. ``process_sets``: a sequence of :class:`.process_sets.ProcessSet`, or ``"dynamic"``, which
    is always the case here. ``timeout_s``: how long silent ranks are waited for (default:
    HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, or 300).
    """
    global _world, _generation
    if _world is not None:
        return
    settings = settings_of_environment()
    settings.timeout_s = timeout_s or settings.timeout_s
    launch = detect()
    if launch.launcher is not None:
        # Nobody else ends a job of mpirun when a rank fails: the others would wait for it.
        install_exception_hook(os._exit)
    chosen = _chosen(comm, launch)
    rank, size = (chosen.index(launch.rank), len(chosen)) if launch.rank in chosen else (0, 1)
    _generation += 1
    store: Any = None
    if launch.size > 1:
        run = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        ranks = "" if len(chosen) == launch.size else f"/{chosen}"
        store = dist.PrefixStore(f"commlab/horovod/{'/'.join(run)}/{_generation}{ranks}", _store_of(launch, settings))
    here = Member(launch.rank, launch.size)
    group = connect(
        dist.PrefixStore("0", store) if size > 1 else None, rank, size, settings.timeout_s, here, aside=True
    )
    engine = Background(settings)
    engine.add(0, group, range(size))
    global_process_set.ranks, ProcessSet.here = list(range(size)), rank
    _world = World(engine, group, store, here)
    atexit.register(_at_exit)
    timeline.begin(rank)
    if process_sets is not None and process_sets != "dynamic":
        for each in process_sets:
            add_process_set(each)


def _store_of(launch: Launch, settings: Any) -> dist.Store:
    global _store
    if launch.launcher != "torchrun":
        import_mpi(launch, settings.timeout_s)
        if _store is None:
            _store = store_for(launch, settings.timeout_s)
        return _store
    return store_for(launch, settings.timeout_s)


def _chosen(comm: Any, launch: Launch) -> list[int]:
    if comm is None or (isinstance(comm, (list, tuple)) and not comm):
        return list(range(launch.size))
    found = ProcessSet(comm).ranks
    assert found is not None
    if found[-1] >= launch.size:
        raise UsageError(f"rank {launch.rank}: init() of ranks {found}; the job has ranks 0..{launch.size - 1}")
    return found


def shutdown() -> None:
    """End the engine; :func:`init` may be called again. Collective: operations of ranks that go on are errors."""
    _end("has called shutdown()", _SHUTDOWN_S)


def _at_exit() -> None:
    _end("has ended", _EXIT_S)


def _end(why: str, wait_s: float) -> None:
    global _world
    if _world is None:
        return
    world, _world = _world, None
    if os.getpid() != world.engine.pid:
        return  # a process that was forked from a rank
    atexit.unregister(_at_exit)
    world.engine.close(why, wait_s if world.group.size > 1 else 0.0)
    timeline.end()
    for each in world.sets.values():
        if each is not global_process_set:
            each.process_set_id = None
    global_process_set.ranks = ProcessSet.here = None


def is_initialized() -> bool:
    """Whether :func:`init` was called, and :func:`shutdown` not since."""
    return _world is not None


def rank() -> int:
    """This process's rank."""
    return require().group.rank


def size() -> int:
    """How many ranks there are."""
    return require().group.size


def local_rank() -> int:
    """The rank's index on its node."""
    return require().group.local_rank


def local_size() -> int:
    """How many ranks this rank's node has."""
    return require().group.local_size


def _across() -> list[int]:
    group = require().group
    return [node[group.local_rank] for node in group.nodes if len(node) > group.local_rank]


def cross_rank() -> int:
    """The index of this rank among the ranks of its local rank, one on each node."""
    return _across().index(rank())


def cross_size() -> int:
    """How many nodes have a rank of this local rank."""
    return len(_across())


def is_homogeneous() -> bool:
    """Whether all nodes have equally many ranks."""
    return len({len(node) for node in require().group.nodes}) == 1


def add_process_set(process_set: Any) -> ProcessSet:
    """Register a process set (or a sequence of ranks) on all ranks of the job, in it or not. Collective over all of
    them. A set of the same ranks has the same number. The ranks of the set share memory, or connect."""
    world = require()
    made = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    if made.ranks is None or made.ranks[-1] >= world.group.size:
        raise UsageError(f"rank {world.group.rank}: {made!r}: the job has ranks 0..{world.group.size - 1}")
    if made.process_set_id is not None and made.process_set_id in world.sets:
        raise UsageError(f"rank {world.group.rank}: {made!r} is registered already")
    number = world.agree("add process set", made.ranks)
    same = next((each for each in world.sets.values() if each.ranks == made.ranks), None)
    if same is not None:
        made.process_set_id = same.process_set_id
        return made
    if world.group.rank in made.ranks:
        index, count = made.ranks.index(world.group.rank), len(made.ranks)
        store = dist.PrefixStore(str(number), world.store) if count > 1 else None
        group = connect(store, index, count, world.engine.settings.timeout_s, world.here, aside=True)
        world.engine.add(number, group, made.ranks)
    made.process_set_id = number
    world.sets[number] = made
    return made


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a process set on all ranks of the job. Collective over all of them; False for the set of all ranks, and
    for one that is not registered."""
    world = require()
    number = process_set.process_set_id
    if not number or number not in world.sets or process_set.ranks is None:
        return False
    world.agree("remove process set", process_set.ranks)
    removed = world.sets.pop(number)
    if world.group.rank in process_set.ranks:
        world.engine.remove(number)
    removed.process_set_id = process_set.process_set_id = None
    return True


def join() -> int:
    """This rank has no more inputs: it contributes zeros to the others' allreduces until all ranks have joined. Returns
    the rank that joined last."""
    world = require()
    submission = Submission(Announcement("join", "join", detail=json.dumps(world.counters())))
    world.engine.join(submission)
    last, counters = submission.result()
    world.count_from(counters)
    return int(last)
