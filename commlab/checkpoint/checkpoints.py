"""Checkpoints of a training run: every rank writes what it owns, and any number of ranks takes up what each needs.

    rank r   its pieces of the parameters and of the optimizer's state; torch's, Python's and numpy's random state
    rank 0   also what exists once: buffers, frozen parameters, extra state, the schedule, what the caller adds

Under ``ps`` and ``dps`` pieces are shards; under the other strategies rank 0 writes them all. So a checkpoint holds
every number once, whatever the number of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch

from .. import trace
from ..errors import AgreedError, UsageError
from ..gradients.parameters import NamedParameter, buffers_by_name, parameters_by_name, plain_name, unexpanded
from ..runtime.control import gather_bytes, raise_together
from ..runtime.group import Group
from ..runtime.raw import bytes_of, write_bytes
from . import files, random_state
from .same import require_same_model, require_same_scheduler, with_extra_state
from .writer import Writer


class Saved(Protocol):
    """What :class:`Checkpoints` needs of an engine (:class:`commlab.strategies.engine.Engine`)."""

    @property
    def name(self) -> str:
        """The strategy's name, for the manifest."""

    @property
    def group(self) -> Group:
        """The ranks that train, all of which write and read."""

    @property
    def parameters(self) -> Sequence[NamedParameter]:
        """What is trained."""

    @property
    def saves_state(self) -> bool:
        """Whether this rank writes its part of the state; else another rank has the same."""

    @property
    def own_buffers(self) -> bool:
        """Whether every rank has buffers of its own; else all have rank 0's."""

    def settle(self) -> None:
        """Make every rank's parameters the newest. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: counters, loss scale, and by name and range the optimizer's state."""

    def load_state_dict(self, *parts: dict[str, Any]) -> None:
        """Take from any ranks' states what this rank owns."""

    def update_parameters(self, change: Callable[[torch.nn.Module], object]) -> None:
        """Run ``change(model)``, which writes parameters in place, once for every copy of them. Collective."""


def _plainly_named(state: dict[str, Any]) -> dict[str, Any]:
    """An engine's state with the names that a model has which is not compiled."""
    renamed: dict[str, Any] = {
        kind: {plain_name(name): pieces for name, pieces in state[kind].items()}
        for kind in ("pieces", "frozen")
        if kind in state
    }
    return {**state, **renamed}


class Checkpoints:
    """Saves and restores ``model``, ``engine`` (its optimizer, loss scale, counters), ``scheduler`` and random state.

    ``folder``: on a file system that all ranks see. From :meth:`claim` or the first :meth:`save` on no other program
    may write there, nor another object. ``keep``: how many of the newest checkpoints stay, at least 1; with 2 there is
    one to fall back to. All ranks of the engine's group make the same calls, between steps. Errors: UsageError, on all
    ranks.
    """

    def __init__(
        self,
        folder: str | Path,
        model: torch.nn.Module,
        engine: Saved,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        keep: int = 2,
    ):
        if keep < 1:
            raise UsageError(f"checkpoints to keep: at least 1, got {keep}")
        self.folder, self.keep = Path(folder), keep
        self.refused: list[str] = []
        """The checkpoints that :meth:`restore` did not take, and why; equal on all ranks."""
        self._refused: set[str] = set()
        self._model, self._engine, self._scheduler, self._group = model, engine, scheduler, engine.group
        self._good: list[Path] = []
        """Checkpoints that are known to be whole, the newest last."""
        self._run = uuid4().hex
        """Names the run, restarts included: its checkpoints go one after the other, those of others stay."""
        self._writer: Writer | None = None
        """On rank 0, once it has saved: the right to write into the folder."""

    def save(self, step: int, more: Any = None) -> Path:
        """Write the checkpoint after ``step`` steps; returns its folder. Collective. Once this call returns, on any
        rank, the checkpoint survives the death of every process; until then the checkpoints before it are untouched.
        ``more``: what the caller needs besides, equal on all ranks; of types that
        :func:`commlab.checkpoint.nested.pack` takes.

        Cost: the state is written once over all ranks, and read once (from memory) for its checksum; training waits.
        """
        group = self._group
        self._engine.settle()
        with trace.span("checkpoint"):
            raise_together(group, lambda: self._begin(step) if group.rank == 0 else None)
            partial = files.aside(self.folder, step)
            name = f"rank-{group.rank}-of-{group.size}.safetensors"
            own = raise_together(group, lambda: files.write_state(partial, name, self._own_state(step, more)))
            records = gather_bytes(group, json.dumps(own).encode(), "parts of the checkpoint")
            written = [files.StateFile(*json.loads(record)) for record in records]
            about = {"ranks": group.size, "strategy": self._engine.name, "run": self._run}
            path = raise_together(
                group, lambda: files.commit(self.folder, step, written, about) if group.rank == 0 else Path()
            )
            path = Path(os.fsdecode(gather_bytes(group, os.fsencode(path), "name of the checkpoint")[0]))
            self._good.append(path)
            raise_together(group, lambda: self._prune() if group.rank == 0 else None)
        return path

    def restore(self) -> tuple[int, Any] | None:
        """Take up the newest checkpoint that is whole: returns its step and ``more``, or None where there is no
        checkpoint at all. Collective. Truncated and altered ones are passed over and listed in ``refused``; UsageError
        where all were.

        The optimizer's hyper-parameters, learning rate included, become those of the checkpoint. Random state comes
        back on as many ranks as have saved; on another number every rank draws a new one from its own and the step.
        """
        group = self._group
        listed = raise_together(group, lambda: files.newest_first(self.folder) if group.rank == 0 else [])
        names = gather_bytes(group, json.dumps([path.name for path in listed]).encode(), "checkpoints")[0]
        found = [self.folder / name for name in json.loads(names)]
        for path in found:
            manifest = self._checked(path)
            if manifest is not None:
                self._good.append(path)
                self._run = manifest.get("run", self._run)
                return manifest["step"], self._take(path, manifest)
        if found:
            raise AgreedError(
                f"none of the {len(found)} checkpoints in {self.folder} is whole: {'; '.join(self.refused)}; "
                "start anew without --resume, in another folder"
            )
        return None

    def close(self) -> None:
        """Let another program, or another object of this one, write into the folder. A later :meth:`save` takes the
        folder again. Not collective; the end of the process does it, too."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def claim(self) -> None:
        """Take the right to write into the folder now, and not at the first :meth:`save`, so that a program that may
        not write there knows before its first step. Collective."""
        raise_together(self._group, lambda: self._claimed() if self._group.rank == 0 else None)

    def _claimed(self) -> Writer:
        self._writer = self._writer or files.claim(self.folder)
        return self._writer

    def _begin(self, step: int) -> None:
        files.begin(self.folder, step, self._claimed())

    def require_none(self) -> None:
        """UsageError where the folder holds checkpoints: those of another run would be mixed with those of this one.
        Collective."""
        found = raise_together(self._group, lambda: files.newest_first(self.folder) if self._group.rank == 0 else [])
        newest = os.fsdecode(gather_bytes(self._group, os.fsencode(found[0]) if found else b"", "newest checkpoint")[0])
        if newest:
            raise AgreedError(
                f"there are checkpoints already, the newest {newest}; --resume goes on from it, another "
                "--checkpoint-dir starts anew"
            )

    def _own_state(self, step: int, more: Any) -> dict[str, Any]:
        """The state that this rank writes."""
        engine, rank = self._engine, self._group.rank
        devices = {item.tensor.device for item in engine.parameters if item.tensor.is_cuda}
        state: dict[str, Any] = {"step": step, "random": random_state.take(devices)}
        if engine.own_buffers and rank:
            state["buffers"] = dict(self._model.named_buffers())
        if engine.saves_state:
            state["engine"] = engine.state_dict()
            values = {item.name: item.tensor.detach().reshape(-1) for item in engine.parameters}
            for name, pieces in state["engine"]["pieces"].items():
                for piece in pieces:
                    piece["value"] = values[name][piece["start"] : piece["stop"]]
        if rank == 0:
            state["fixed"] = dict(self._fixed())
            state["scheduler"] = None if self._scheduler is None else self._scheduler.state_dict()
            state["scheduler_class"] = type(self._scheduler).__name__
            state["extra"] = {name: module.get_extra_state() for name, module in with_extra_state(self._model)}
            state["more"] = more
        return state

    def _fixed(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors that are not trained, by name."""
        trained = {item.name for item in self._engine.parameters}
        frozen = [(name, tensor) for name, tensor in parameters_by_name(self._model) if name not in trained]
        return [*frozen, *buffers_by_name(self._model)]

    def _checked(self, path: Path) -> dict[str, Any] | None:
        """The manifest of a checkpoint that is whole; else None, and the reason goes to ``refused``. Ranks share the
        reading."""
        group = self._group
        text = reason = ""

        def look() -> None:
            nonlocal text, reason
            try:
                text = files.read_manifest(path)
                for file in files.state_files(json.loads(text))[group.rank :: group.size]:
                    files.verify(path, file)
            except files.Refused as refused:
                text, reason = "", str(refused)

        raise_together(group, look)
        records = gather_bytes(group, json.dumps([text, reason]).encode(), "checkpoint found")
        texts, reasons = zip(*(json.loads(record) for record in records), strict=True)
        if any(reasons):
            self.refused.append(f"{path.name}: {next(filter(None, reasons))}")
            self._refused.add(path.name)
            return None
        if len(set(texts)) > 1:
            raise AgreedError(f"{path} is not the same on all ranks: the folder must be on one shared file system")
        manifest: dict[str, Any] = json.loads(text)
        return manifest

    def _take(self, path: Path, manifest: dict[str, Any]) -> Any:
        """Take up a checkpoint that is whole; returns ``more``. Collective."""
        # Every rank opens all files, and reads what it needs: tensors lie in mapped files.
        states = raise_together(
            self._group, lambda: [files.read_state(path, file) for file in files.state_files(manifest)]
        )
        owned = [_plainly_named(state["engine"]) for state in states if "engine" in state]
        fixed = {plain_name(name): tensor for name, tensor in states[0]["fixed"].items()}

        def load() -> None:
            steps = {state["step"] for state in states}
            if steps != {manifest["step"]}:
                raise UsageError(
                    f"{path} has parts of steps {sorted(steps)} under a manifest of step {manifest['step']}"
                )
            require_same_model(self._engine.parameters, self._fixed(), owned, fixed)
            require_same_scheduler(self._scheduler, states[0], speak=self._group.rank == 0)
            self._engine.load_state_dict(*owned)

        raise_together(self._group, load)
        self._engine.update_parameters(lambda _: self._write_values(owned, fixed))
        if len(states) == self._group.size and "buffers" in (own := states[self._group.rank]):
            for name, tensor in self._model.named_buffers():
                _overwrite(tensor, own["buffers"][name])
        for name, module in with_extra_state(self._model):
            if name in states[0].get("extra", {}):
                module.set_extra_state(states[0]["extra"][name])
        if self._scheduler is not None and states[0]["scheduler"] is not None:
            self._scheduler.load_state_dict(states[0]["scheduler"])
        if len(states) == self._group.size:
            random_state.give(states[self._group.rank]["random"])
        else:
            random_state.draw_anew([state["random"] for state in states], manifest["step"])
        return states[0]["more"]

    def _write_values(self, owned: list[dict[str, Any]], fixed: dict[str, torch.Tensor]) -> None:
        for item in self._engine.parameters:
            for piece in (piece for state in owned for piece in state["pieces"].get(item.name, ())):
                whole = item.tensor.data
                if whole.is_contiguous():
                    whole.view(-1)[piece["start"] : piece["stop"]].copy_(piece["value"])
                else:
                    flat = whole.reshape(-1)
                    flat[piece["start"] : piece["stop"]] = piece["value"]
                    whole.copy_(flat.view(whole.shape))
        for name, tensor in self._fixed():
            target = unexpanded(tensor.detach())
            _overwrite(target, fixed[name][tuple(slice(0, size) for size in target.shape)])

    def _prune(self) -> None:
        """Of this run's checkpoints all but the newest good ones go: also those that were refused, once there is a
        newer one. What another run has written stays."""
        old = self._good[: -self.keep]
        del self._good[: -self.keep]
        for path in files.newest_first(self.folder):
            if path in self._good:
                continue
            if path in old or path.name in self._refused or files.run_of(path) == self._run:
                files.remove(path)


def _overwrite(tensor: torch.Tensor, saved: torch.Tensor) -> None:
    """Bit for bit where the dtypes are equal; else cast, as torch's ``load_state_dict`` does."""
    if tensor.dtype == saved.dtype:
        write_bytes(tensor, bytes_of(saved))
    else:
        tensor.data.copy_(saved)
