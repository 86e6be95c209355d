"""What the user sees of a run: a few lines at the start, a progress bar, the metrics, and a table at the end; rank 0
prints."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import native, trace
from ..collectives.allreduce import allreduce_async
from ..collectives.plan import pick
from ..errors import NotFiniteError
from ..job.machine import interface_bytes_sent, memory_bytes
from ..job.version import __version__
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..strategies.engine import Engine
from ..strategies.steps import Times
from .config import Config
from .data.batches import Batch
from .display import Display
from .metrics import Metrics, versions
from .model import describe_model
from .sample import Sample
from .summary import Totals, exchanges_by_library, gather, rows


class _Step(NamedTuple):
    """A step that is done but for the numbers that other ranks have to add."""

    batch: Batch
    values: Handle | None
    """The sums over ranks of the loss, of warnings and of each rank's seconds of computation, on their way; None where
    ranks are not in lockstep."""
    row: dict[str, Any]
    """The step's line of metrics."""
    counts: bool
    """Whether the step counts in the totals."""


class Report:
    """The report of one run. Every rank makes one, because the loss and the table need all ranks; rank 0 alone
    prints."""

    def __init__(self, config: Config, group: Group, engine: Engine, total_steps: int, started_s: float):
        self.config, self.group, self.engine, self.total_steps = config, group, engine, total_steps
        self._started_s = started_s
        self._on_rank_0 = group.rank == 0
        self._display = Display(config.progress, config.progress_every)
        self._metrics = Metrics(None, None, False)
        self._totals = Totals()
        self._phases: dict[str, float] = {}
        self._last_step: _Step | None = None
        """The step before, until the sums over all ranks have arrived."""
        self._exchanges_by_library = exchanges_by_library(engine)
        self._first_loss: float | None = None
        self._last_loss: float | None = None
        self._held_out = float("nan")
        self._bytes_before = 0
        self._measures_memory = False
        """Whether memory is measured in this step: the largest tensors exist once an optimizer step was made."""
        self._memory_bytes = 0
        """The most memory that was measured on this rank."""
        self.preempted = False
        """Whether a rank had been warned of the job's end when it ended the step before; equal on all ranks."""

    def _print(self, text: str) -> None:
        if self._on_rank_0:
            self._display.line(text)

    def failed(self, text: str) -> None:
        """Show what went wrong without ending the run; on the rank that it happened on."""
        self._display.error(f"commlab: {text}")

    def opening(
        self, corpus: str, threads: int, why: str, samples: int, start_step: int = 0, refused: Sequence[str] = ()
    ) -> None:
        """Print which ranks take part, with which model and data, and what was chosen automatically.

        ``corpus``: a line about the text. ``threads`` and ``why``: of torch, per rank. ``samples``: how many make an
        epoch. ``refused``: why newer checkpoints than the one of ``start_step`` were passed over.
        """
        config, group, engine = self.config, self.group, self.engine
        numel = sum(item.tensor.numel() for item in engine.parameters)
        per_rank = config.batch_size / (group.size * config.grad_accumulation)
        self._print(
            f"commlab {__version__}: strategy {config.strategy}, {group.size} "
            f"rank{'s' * (group.size > 1)} on {len(group.nodes)} "
            f"node{'s' * (len(group.nodes) > 1)}, transport {group.transport.name}, progress {group.progress_mode}"
        )
        if engine.serving:
            self._print(engine.serving)
        elif group.size > 1:
            self._print(
                "window: shared by all ranks"
                if group.window is not None
                else "window: one on each node"
                if group.node is not None
                else f"no window: {group.window_reason}"
            )
        if not engine.serving and engine.buckets.buckets and group.size > 1:
            largest = max(bucket.numel for bucket in engine.buckets.buckets)
            kind = {"allreduce": "allreduce", "ps": "reduce"}.get(config.strategy, "reduce_scatter")
            wire = engine.buckets.buckets[0].dtype
            algorithm, reason = pick(group, kind, config.algorithm, largest, wire)
            if engine.levels is not None:
                shard = -(-largest // group.local_size)
                kind = "reduce" if config.strategy == "ps" else "allreduce"
                algorithm, reason = pick(engine.levels.across, kind, config.algorithm, shard, wire)
                algorithm, reason = f"window on each node, {algorithm} between nodes", f"of that: {reason}"
            count = len(engine.buckets.buckets)
            self._print(
                f"gradients: {count} bucket{'s' * (count > 1)}, the largest "
                f"{largest * wire.itemsize / 2**20:.3g} MB, wire {config.wire or 'as is'}, "
                f"algorithm {algorithm} ({reason})"
            )
        if engine.sharding:
            self._print(f"shards: {engine.sharding}")
        self._print(f"arithmetic: {native.backend()}; {threads} torch thread{'s' * (threads > 1)} per rank ({why})")
        if config.precision != "fp32":
            self._print(f"precision {config.precision}: {engine.precision.reason}")
        device = engine.parameters[0].tensor.device  # ddp's engine.model is a front without parameters of its own
        if device.type == "cuda":
            self._print(f"device: {torch.cuda.get_device_name(device)}, packing {native.cuda_backend()}")
        start = "its own weights" if describe_model(config.model).weights else f"weights drawn by seed {config.seed}"
        self._print(
            f"model {config.model}: {numel / 1e6:.2f} M parameters, {start}, sequences of {config.seq_len} tokens"
        )
        self._print(f"data: {corpus}")
        self._print(
            f"batch: {config.batch_size} sequences in all, {per_rank:g} per rank"
            + (f" and micro-batch ({config.grad_accumulation} of them)" if config.grad_accumulation > 1 else "")
            + f"; {self.total_steps} steps, {self.total_steps * config.batch_size / samples:.2f} epochs"
        )
        self._start_step, self._steps_done = start_step, 0
        if self._on_rank_0:
            # A resumed run goes on in the metrics file of the run before.
            self._metrics = Metrics(config.metrics, config.tensorboard, append=config.resume)
            weakref.finalize(self, self._metrics.close)  # a run may end with an error
        for reason in refused:
            self._print(f"checkpoint REFUSED: {reason}; the one before it is used")
        if config.resume:
            where = f"from step {start_step}" if start_step else "at the beginning: there is no checkpoint"
            self._print(f"resume: {where} in {config.checkpoint_folder}")
        self._write(
            {
                "config": config.as_dict(),
                "start_step": start_step,
                "ranks": group.size,
                "nodes": len(group.nodes),
                "versions": versions(),
            }
        )
        if self._on_rank_0:
            self._display.start(self.total_steps, start_step)

    def step_begins(self) -> None:
        self._phases = dict.fromkeys(("forward", "backward", "step"), 0.0)
        self.engine.times = Times()
        self._measures_memory = self._steps_done == 1
        self._bytes_before = self.group.bytes_sent
        # On one node nothing that ranks send passes a network interface.
        self._interface_bytes_before = interface_bytes_sent() if len(self.group.nodes) > 1 else 0
        self._step_started_ns = time.perf_counter_ns()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step; phases of the same name add up."""
        started_s = time.perf_counter()
        with trace.span(name):
            yield
        self._phases[name] += time.perf_counter() - started_s
        if self._measures_memory:
            self._memory_bytes = max(self._memory_bytes, memory_bytes())

    def step_ends(self, batch: Batch, losses: torch.Tensor, total: int, lr: float, warned: bool = False) -> None:
        """Take in a step. ``losses``: the sum of this rank's token losses; ``total``: the tokens of all ranks;
        ``warned``: whether this rank has been warned that the job will end.

        The mean loss over all ranks, and how long each rank has computed, are known and shown one step later: no rank
        waits for them.
        """
        ended_ns = time.perf_counter_ns()
        trace.record(f"step {batch.step}", "steps", self._step_started_ns, ended_ns, step=batch.step)
        wall_s = (ended_ns - self._step_started_ns) / 1e9
        times, totals = self.engine.times, self._totals
        # The time that backward spent on packing and launching, and forward on waiting, is exchange, not computation.
        backward_s = self._phases["backward"] - (times.exchange_s - times.forward_wait_s - self._step_exchange())
        forward_s = self._phases["forward"] - times.forward_wait_s
        self._steps_done += 1
        if self._steps_done == 1:
            self._print(f"first step done {time.perf_counter() - self._started_s:.1f} s after the start")
        counts = self._steps_done > min(2, self.total_steps - self._start_step - 1)
        if counts:
            totals.steps += 1
            totals.bytes_sent += self.group.bytes_sent - self._bytes_before
            totals.tokens += total
            totals.wall_s += wall_s
            totals.forward_s += forward_s
            totals.backward_s += backward_s
            totals.exchange_s += times.exchange_s
            totals.update_s += times.update_s
        row = {
            "step": batch.step,
            "epoch": batch.epoch,
            "lr": lr,
            "tokens": total,
            "grad_norm": self.engine.grad_norm,
            "loss_scale": self.engine.precision.scale,
            "skipped_steps": self.engine.skipped_steps,
            "step_s": wall_s,
            "forward_s": forward_s,
            "backward_s": backward_s,
            "exchange_s": times.exchange_s,
            "update_s": times.update_s,
            "bytes_sent": self.group.bytes_sent - self._bytes_before,
        }
        if len(self.group.nodes) > 1:
            row["interface_bytes_sent"] = interface_bytes_sent() - self._interface_bytes_before
        self._finish_step()
        values = torch.zeros(2 + self.group.size, dtype=torch.float64, device="cpu")
        values[0], values[1], values[2 + self.group.rank] = losses / total, warned, forward_s + backward_s
        # Ranks that are not in lockstep wait for no other rank's values: rank 0 shows its own loss.
        handle = allreduce_async(values, "sum", "loss", group=self.group) if self.engine.averages else None
        self._last_step = _Step(batch, handle, {**row, "loss": float(values[0])}, counts)

    def _step_exchange(self) -> float:
        """Seconds of the exchange that lie in step(), not in backward."""
        return self._phases["step"] - self.engine.times.update_s

    def _finish_step(self) -> None:
        """Complete the step before with the values of all ranks, and show it."""
        if self._last_step is None:
            return
        batch, values, row, counts = self._last_step
        self._last_step = None
        if values is not None:
            row["loss"], warnings, *compute_s = values.wait().tolist()
            self.preempted = self.preempted or warnings > 0
            if not self._exchanges_by_library:
                row["slowest_compute_s"] = max(compute_s)
                row["slowest_rank"] = compute_s.index(max(compute_s))
                row["waited_s"] = min(row["exchange_s"], max(compute_s) - compute_s[self.group.rank])
                self._totals.waited_s += row["waited_s"] if counts else 0.0
        loss = row["loss"]
        self._require_finite(f"the loss of step {batch.step}", loss)
        if self._first_loss is None:
            self._first_loss = loss
        self._last_loss = loss
        self._write(row)
        if self._on_rank_0:
            exchanging = row["exchange_s"] / row["step_s"]
            speed = row["tokens"] / row["step_s"]
            self._display.update(
                batch.step + 1, f"loss {loss:.3f}, {speed:,.0f} tokens/s, {exchanging:.0%} communicating"
            )

    def _write(self, row: dict[str, Any]) -> None:
        """Write to the metrics, and show where that has failed for the first time."""
        known = self._metrics.trouble
        self._metrics.write(row)
        if self._metrics.trouble != known:
            self.failed(self._metrics.trouble)

    @property
    def trouble(self) -> str:
        """What this rank could not write; empty: nothing."""
        return self._metrics.trouble

    def _require_finite(self, what: str, value: float) -> None:
        """NotFiniteError for a value that is not, where the run is to end then; equal on all ranks in lockstep."""
        if self.config.nonfinite == "error" and not math.isfinite(value):
            raise NotFiniteError(
                f"{what} is {value}; nothing of use follows. Take a smaller --lr, or resume from a checkpoint; "
                "--nonfinite skip leaves out the steps whose gradient is not finite"
            )

    def saved(self, step: int, path: Path, took_s: float) -> None:
        """Show that the checkpoint after ``step`` steps is on disk."""
        self._finish_step()
        self._write({"step": step, "checkpoint_s": took_s})
        self._print(f"checkpoint {path} ({took_s:.2f} s)")

    def leaving(self, step: int) -> None:
        """Show that the run ends because a rank was warned, with a checkpoint after ``step`` steps."""
        self._display.close()
        self._print(f"SIGUSR1: the run ends after step {step}, which is saved; --resume goes on")
        self._metrics.close()

    def evaluated(self, step: int, bits: float) -> None:
        """Show ``bits``, the held-out bits per byte after ``step`` steps."""
        self._finish_step()
        self._require_finite(f"the held-out loss after step {step}", bits)
        self._held_out = bits
        self._write({"step": step, "held_out_bits_per_byte": bits})
        self._print(f"after step {step}: held-out {bits:.3f} bits per byte")

    def sampled(self, sample: Sample) -> None:
        """Show how the trained model continues a line of held-out text."""
        self._display.close()
        self._print(sample.shown(self.config.sample, self.config.seed))
        self._write({"sample": {"prompt": sample.prompt, "generated": sample.generated}})
        self._metrics.text("sample", f"{sample.prompt}\n\n{sample.generated}")

    def closing(self, folder: str) -> None:
        """Show the summary table, with peaks and sums over all ranks. ``folder``: where the model is; "" where it could
        not be saved. Collective."""
        self._finish_step()
        summary = gather(self.group, self.engine, self._totals, self._memory_bytes)
        self._display.close()
        learned = {
            "first_loss": self._first_loss,
            "last_loss": self._last_loss,
            "held_out_bits_per_byte": self._held_out,
        }
        took_s = time.perf_counter() - self._started_s
        table = rows(self.config, self.engine, summary, learned, took_s, folder)
        width = max(map(len, table))
        self._print("\n".join(f"{name:<{width}}  {value}" for name, value in table.items()))
        self._write({"summary": {**summary.as_dict(), **learned}})
        self._metrics.close()
