"""``python -m bench.training.fuzzed SEED SECONDS COUNT FILE``: this rank's part of random training programs, one seed
after the other for SECONDS, or COUNT of them where it is not 0, each compared step by step with plain torch. Rank 0
writes a line of JSON for each program into FILE: before the program runs, so that the last line names the one that
failed. For :mod:`bench.fuzz`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import commlab
from commlab.checkpoint import Checkpoints
from commlab.strategies.engine import Engine

from . import plain
from .programs import TrainingProgram, draw
from .small_models import make_model

WIRE_ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""The largest relative error of rounding a number to a wire's dtype."""


class Difference(AssertionError):
    """A number that is not plain torch's."""


class Fuzzed:
    """A program, trained through commlab; and by plain torch beside it, on every rank."""

    def __init__(self, program: TrainingProgram, group: commlab.Group, folder: Path):
        self.program, self.group, self.folder = program, group, folder
        self.plain = plain.PlainTraining(program)
        self.phase = 0
        self.model = plain.start_model(program)
        self.optimizer = plain.start_optimizer(self.model, program)
        self.scheduler = plain.start_scheduler(self.optimizer, program)
        self.engine = self._couple()

    def _couple(self) -> Engine:
        name, options = self.program.strategies[self.phase]
        return commlab.strategy(
            name, self.model, self.optimizer, self.group, max_grad_norm=self.program.max_grad_norm, **options
        )

    @property
    def serves(self) -> bool:
        return self.engine.role == "server"

    def run(self) -> None:
        """All steps. Where this rank serves, a strategy's constructor has returned after that strategy's last step."""
        for number, step in enumerate(self.program.steps):
            for event in step.events:
                self._happen(event, number)
            self.plain.step(number, self.program.trainers(self.phase))
            if self.serves:
                continue
            self._step(number)
            self._compare(f"step {number}")
        self.engine.close()
        if not self.serves:
            self._compare("the end")
            self._compare_state()

    def _happen(self, event: str, number: int) -> None:
        """What happens before a step."""
        self.plain.happen(event)
        if event in ("checkpoint", "reopen"):
            self._change(event, number)
        elif not self.serves:
            if event == "raise":
                self._fail(number)
            elif event == "write":
                self.engine.update_parameters(plain.write)
            elif event == "evaluate":
                self.engine.settle()
                with torch.no_grad():
                    self.engine.model.eval()
                    plain.loss_of(self.engine.model, self.program, number, *self._some_batch(number))
                    self.engine.model.train()
            else:
                plain.happen(event, self.model, self.optimizer)

    def _some_batch(self, number: int) -> tuple[int, int]:
        """A rank and a micro-batch of it that is not empty."""
        found = ((r, m) for r, sizes in enumerate(self.program.steps[number].samples) for m, n in enumerate(sizes) if n)
        return next(found)

    def _change(self, event: str, number: int) -> None:
        """Close the engine, and go on with the next strategy: on the same model, or on one that restores the run."""
        if event == "checkpoint" and not self.serves:
            self.engine.settle()
            self._checkpoints().save(number)
        self.engine.close()
        self.phase += 1
        if self.serves and self.scheduler is not None and self.plain.scheduler is not None:
            # A rank that has served made no steps: its scheduler is the one thing that nobody gives it.
            self.scheduler.load_state_dict(self.plain.scheduler.state_dict())
        if event == "checkpoint":
            self.model = make_model(self.program.model, self.program.seed + 1, getattr(torch, self.program.dtype))
            for name, parameter in self.plain.model.named_parameters():
                dict(self.model.named_parameters())[name].requires_grad_(parameter.requires_grad)
            self.optimizer = self._as_plain_groups()
            self.scheduler = plain.start_scheduler(self.optimizer, self.program)
        self.engine = self._couple()
        if event == "checkpoint" and not self.serves:
            restored = self._checkpoints().restore()
            if restored is None or restored[0] != number:
                raise Difference(f"the checkpoint of step {number} was not restored, but {restored}")

    def _as_plain_groups(self) -> torch.optim.Optimizer:
        """An optimizer of the new model with the groups that the old one has by now, as a program that is started again
        makes them."""
        optimizer = plain.start_optimizer(self.model, self.program)
        names = {id(parameter): name for name, parameter in self.plain.model.named_parameters()}
        mine = dict(self.model.named_parameters())
        optimizer.param_groups.clear()
        for group in self.plain.optimizer.param_groups:
            optimizer.add_param_group({**group, "params": [mine[names[id(each)]] for each in group["params"]]})
        return optimizer

    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder, self.model, self.engine, self.scheduler)

    def _fail(self, number: int) -> None:
        """A step that ends in an exception on all ranks, and is dropped."""
        engine = self.engine
        with engine.no_sync():
            engine.backward(engine.model(torch.ones(1, 6, dtype=getattr(torch, self.program.dtype))).sum())
        try:
            raise ArithmeticError(f"in the forward of step {number}")
        except ArithmeticError:
            engine.zero_grad()

    def _step(self, number: int) -> None:
        program, engine, step = self.program, self.engine, self.program.steps[number]
        rank, trainers = engine.group.rank, engine.group.size
        total: float | None = None
        if step.counted != "mean" and step.total_known:
            total = plain.total_of(program, number, trainers)
            total = int(total) if step.counted == "count" else total
        for micro_batch, last in plain.micro_batches(step, rank):
            with nullcontext() if last else engine.no_sync():
                if not step.samples[rank][micro_batch]:
                    engine.backward(None, 0, total)
                    continue
                loss, count = plain.loss_of(engine.model, program, number, rank, micro_batch)
                if step.counted == "mean":
                    engine.backward(loss / len(step.samples[rank]))
                else:
                    engine.backward(loss, int(count) if step.counted == "count" else count, total)
        if "edit" in step.events:
            plain.edit(piece.tensor for piece in engine.reduced_gradients())
        engine.step()
        engine.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def _tolerance(self, name: str, wanted: torch.Tensor) -> float:
        """How far a tensor's norm of the difference may be: rounding in the tensor's dtype, a few times for each step,
        and the wire's rounding of each update that was made of it."""
        rounding = torch.finfo(wanted.dtype).eps * 200 * (1 + len(self.program.steps))
        if wanted.dtype == torch.float64:
            rounding = 1e-9
        wire = WIRE_ROUNDING.get(self.program.wire or "", 0.0) * 8 * self.plain.moved.get(name, 0.0)
        return rounding * max(1.0, float(wanted.double().norm())) + wire

    def _compare(self, when: str) -> None:
        """Every parameter and buffer, and the norm, with plain torch's."""
        self.engine_settled(when)
        mine, wanted = self.model.state_dict(), self.plain.model.state_dict()
        if mine.keys() != wanted.keys():
            raise Difference(f"after {when}: the model has {sorted(mine)} instead of {sorted(wanted)}")
        for name, tensor in wanted.items():
            self._same(name, mine[name], tensor, when)
        if when == "the end" or self.program.max_grad_norm is None:
            return
        norm, wanted_norm = self.engine.grad_norm, self.plain.grad_norm
        assert norm is not None and wanted_norm is not None
        relative = 1e-5 + 8 * WIRE_ROUNDING.get(self.program.wire or "", 0.0)
        if abs(norm - wanted_norm) > relative * max(wanted_norm, 1e-3):
            raise Difference(f"after {when}: the gradient's norm is {norm} instead of {wanted_norm}")

    def engine_settled(self, when: str) -> None:
        if when != "the end":
            self.engine.settle()

    def _same(self, name: str, mine: torch.Tensor, wanted: torch.Tensor, when: str) -> None:
        if mine.shape != wanted.shape or mine.dtype != wanted.dtype:
            raise Difference(f"after {when}: {name} is {mine.dtype}{list(mine.shape)}")
        apart = float((mine.detach().double() - wanted.detach().double()).norm())
        limit = self._tolerance(name, wanted) if wanted.is_floating_point() else 0.0
        if not apart <= limit:
            raise Difference(f"after {when}: {name} is {apart:.3e} from plain torch's, more than {limit:.1e}")

    def _compare_state(self) -> None:
        """The optimizer's state, which close() has given back whole."""
        mine = dict(self.model.named_parameters())
        for name, parameter in self.plain.model.named_parameters():
            wanted = self.plain.optimizer.state.get(parameter, {})
            found = self.optimizer.state.get(mine[name], {})
            if not parameter.numel():
                continue  # there is nothing to remember of no numbers
            for key, value in wanted.items():
                if isinstance(value, torch.Tensor) and value.numel():
                    if key not in found:
                        raise Difference(f"after close(): the optimizer's state of {name} lacks {key!r}")
                    if self.program.wire is None:
                        self._same(f"{key} of {name}", torch.as_tensor(found[key]), value, "close()")


def run(seed: int, group: commlab.Group, folder: Path) -> TrainingProgram:
    """One program, on all ranks."""
    program = draw(seed, group.size)
    own = folder / str(seed)
    Fuzzed(program, group, own).run()
    commlab.barrier(group)
    if group.rank == 0:
        shutil.rmtree(own, ignore_errors=True)
    return program


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training.fuzzed")
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("count", type=int)
    parser.add_argument("file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    group = commlab.init(timeout_s=60)
    folder = Path(tempfile.gettempdir()) / f"commlab-fuzz-{Path(options.file).stem}"
    seed, started_s = options.seed, time.monotonic()
    while True:
        ended = seed - options.seed
        goes_on = ended < options.count if options.count else time.monotonic() - started_s < options.seconds
        told = torch.tensor([goes_on], dtype=torch.int32)
        if not commlab.broadcast(told, root=0, name="whether there is one more", group=group):
            break
        if group.rank == 0:
            write(options.file, draw(seed, group.size).record())
        run(seed, group, folder)
        seed += 1
    if group.rank == 0:
        write(options.file, {"done": seed, "seconds": time.monotonic() - started_s})
    commlab.shutdown()
    return 0


def write(path: str, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
