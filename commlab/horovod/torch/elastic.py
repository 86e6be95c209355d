"""State that survives errors and restarts.

Horovod's launcher adds and removes hosts while a job runs; commlab has none, and leaves restarts to the launcher that
there is (torchrun ``--max-restarts``, a batch system). What the program writes is the same: state, commits, and a
function that is run again. After an error that all ranks live through, the last commit is restored and the function
runs again in the same processes. After the death of a rank the job ends; the restarted one, with any number of ranks,
goes on from the last commit, if COMMLAB_ELASTIC_DIR names a folder for commits.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import files
from ...errors import PeerLostError, PeerTimeoutError, UsageError
from .. import world
from ..exceptions import HostsUpdatedInterrupt
from ..submission import HorovodInternalError
from .functions import broadcast_object, broadcast_optimizer_state, broadcast_parameters
from .sampler import ElasticSampler

log = logging.getLogger("commlab")

FOLDER = "COMMLAB_ELASTIC_DIR"
"""A folder on a file system that all hosts mount: commits of rank 0 are written there, for a restarted job."""
_KEPT = 2
_RESETS = "HOROVOD_ELASTIC_RESET_LIMIT"


class State:
    """What is committed, restored and brought to all ranks. Subclasses say how."""

    def __init__(self) -> None:
        self._reset_callbacks: list[Callable[[], object]] = []

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], object]]) -> None:
        """Functions to be called after the ranks have met anew, in order: to set a learning rate by their number."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """The ranks have met anew."""
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def commit(self) -> None:
        """Keep what there is now, to go on from there after an error."""
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Nothing: hosts do not change while a job runs."""

    def save(self) -> None:
        """Keep a copy on this rank."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to the last copy."""
        raise NotImplementedError

    def sync(self) -> None:
        """Give all ranks the state of rank 0. Collective."""
        raise NotImplementedError

    def reset(self) -> None:
        """What depends on the number of ranks is made anew."""


class ObjectState(State):
    """Plain values, by name; each is an attribute."""

    def __init__(self, **values: Any):
        super().__init__()
        self._names = list(values)
        self._saved: dict[str, Any] = {}
        self._copies: dict[str, Any] = {}
        """What members with a ``state_dict`` had at the last commit."""
        self._commits = 0
        self._refused: set[str] = set()
        """Commits in the folder that are damaged."""
        for name, value in values.items():
            setattr(self, name, value)
        self._keep()

    def _keep(self) -> None:
        self._saved = {name: copy.deepcopy(getattr(self, name)) for name in self._names}

    def save(self) -> None:
        self._keep()

    def restore(self) -> None:
        for name, value in self._saved.items():
            setattr(self, name, copy.deepcopy(value))

    def sync(self) -> None:
        if self._names:
            self._keep()
            self._saved = broadcast_object(self._saved, 0, "elastic_state")
            ObjectState.restore(self)

    def commit(self) -> None:
        super().commit()
        folder = os.environ.get(FOLDER)
        if folder:
            self._commits += 1
            self._write(Path(folder))

    def _write(self, folder: Path) -> None:
        """Rank 0 writes the commit; the folder has the newest ones."""
        if world.rank():
            return
        step = self._commits
        writer = files.claim(folder)
        try:
            files.begin(folder, step, writer)
            state = {"values": self._saved, "states": self._copies}
            written = files.write_state(files.aside(folder, step), "state.safetensors", state)
            files.commit(folder, step, [written], {"ranks": world.size()})
            whole = 0
            for path in files.newest_first(folder):
                # Damaged ones make room too: their numbers may be higher than those of the commits that count.
                if path.name in self._refused or whole >= _KEPT:
                    files.remove(path)
                else:
                    whole += 1
            self._refused.clear()
        finally:
            writer.close()

    def _require_members(self, path: Path, saved: set[str]) -> None:
        """UsageError where the commit is of a state with other members, which would keep what they begin with."""
        own = {*self._names, *self._copies}
        if saved != own:
            raise UsageError(
                f"commit {path} has {', '.join(sorted(saved)) or 'nothing'}, and this program's state has "
                f"{', '.join(sorted(own)) or 'nothing'}; give the state what was committed, or {FOLDER} another folder"
            )

    def read(self, folder: Path) -> bool:
        """Take the newest whole commit of the folder, on this rank; whether there is one."""
        import json

        for path in files.newest_first(folder):
            try:
                manifest = json.loads(files.read_manifest(path))
                (file,) = files.state_files(manifest)
                files.verify(path, file)
            except files.Refused as refused:
                log.warning("commit %s is passed over: %s", path, refused)
                self._refused.add(path.name)
                continue
            state = files.read_state(path, file)
            self._require_members(path, {*state["values"], *state["states"]})
            self._commits = int(manifest["step"])
            self._saved, self._copies = state["values"], state["states"]
            self.restore()
            return True
        return False


class TorchState(ObjectState):
    """A model, an optimizer, samplers and plain values. What has ``state_dict`` and ``load_state_dict`` is kept by
    them; the rest is an attribute of the state, as ``state.epoch``."""

    def __init__(self, model: torch.nn.Module | None = None, optimizer: Any = None, **values: Any):
        stateful = {"model": model, "optimizer": optimizer} | values
        self._stateful = {name: each for name, each in stateful.items() if hasattr(each, "load_state_dict")}
        super().__init__(**{name: each for name, each in values.items() if name not in self._stateful})
        for name, each in self._stateful.items():
            setattr(self, name, each)
        self._copy()

    def _copy(self) -> None:
        self._copies = {name: copy.deepcopy(each.state_dict()) for name, each in self._stateful.items()}

    def save(self) -> None:
        super().save()
        self._copy()

    def restore(self) -> None:
        super().restore()
        for name, each in self._stateful.items():
            each.load_state_dict(copy.deepcopy(self._copies[name]))

    def sync(self) -> None:
        super().sync()
        for name, each in self._stateful.items():
            if isinstance(each, torch.nn.Module):
                broadcast_parameters(each.state_dict(), 0)
            elif isinstance(each, torch.optim.Optimizer):
                broadcast_optimizer_state(each, 0)
            else:
                each.load_state_dict(broadcast_object(each.state_dict(), 0, f"elastic_{name}"))
        self._copy()

    def reset(self) -> None:
        for each in self._stateful.values():
            if isinstance(each, ElasticSampler):
                each.reset()


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func(state, ...)``, run again from the last commit after an error that the ranks live through. The state of
    rank 0, or the newest commit of COMMLAB_ELASTIC_DIR, is brought to all ranks before. After the death of a rank the
    error is raised, so that the launcher can restart the job."""

    @functools.wraps(func)
    def wrapper(state: Any, *args: Any, **kwargs: Any) -> Any:
        world.init()
        folder = os.environ.get(FOLDER)
        if folder and hasattr(state, "read") and world.rank() == 0 and state.read(Path(folder)):
            log.info("rank 0 goes on from the newest commit in %s", folder)
        limit = int(os.environ.get(_RESETS, "0") or 0)
        resets = 0
        while True:
            try:
                state.sync()
                return func(state, *args, **kwargs)
            except HorovodInternalError as error:
                if isinstance(error.__cause__, (PeerLostError, PeerTimeoutError)):
                    raise
                state.restore()
                resets += 1
                if limit and resets >= limit:
                    raise
                log.warning("rank %d runs again from its last commit: %s", world.rank(), error)
            except HostsUpdatedInterrupt:
                pass
            world.shutdown()
            world.init()
            state.on_reset()

    return wrapper


__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]
