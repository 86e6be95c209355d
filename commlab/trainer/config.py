"""What one run does: knobs that were checked together, the defaults that depend on other knobs, and what follows from
them. The only reader of argv.

Importing this loads neither torch nor numpy, so that a mistyped flag is reported at once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..job.cache import cache_folder
from ..job.topology import declared, usable_cores
from ..precision.loss_scale import LossScale
from ..ps.consistency import parse as parse_consistency
from ..strategies.options import Options
from . import config_file
from .data import bpe
from .display import show
from .flags import Flags, check_fields, parse
from .knobs import Knobs
from .model import describe_model

ADAMW_BETAS = (0.9, 0.95)
"""For the trainer's AdamW: 3.16 held-out bits per byte after the default run; torch's own 0.999 ends at 3.20
(docs/data.md)."""


@dataclass(frozen=True)
class Config(Knobs):
    """What one run does. Made by :meth:`from_argv` or directly, and checked either way.

    None stands for a default that depends on other knobs, and is replaced when the object is made: ``seq_len``, ``lr``,
    ``tokenizer``, ``max_grad_norm``, ``eval_every`` and ``sample`` are never None afterwards, and ``wire`` is None
    (numbers travel as they are), "fp16" or "bf16".
    Errors: UsageError, with what was given, what is allowed, and what to do.
    """

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            object.__setattr__(self, "data", (self.data,))
        check_fields(self)
        shape = describe_model(self.model)
        if self.seq_len is not None and self.seq_len > shape.positions:
            raise UsageError(
                f"--seq-len {self.seq_len} is longer than the {shape.positions} positions of --model {self.model};"
                f" give {shape.positions} or fewer, or another model"
            )
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"--steps {self.steps} and --epochs {self.epochs} both say when to stop; give one of them")
        if self.batch_size % self.grad_accumulation:
            raise UsageError(
                f"--batch-size {self.batch_size} can't be cut into {self.grad_accumulation} equal micro-batches"
                " (--grad-accumulation);"
                f" the nearest that can: {_multiples_around(self.batch_size, self.grad_accumulation)}"
            )
        lockstep = parse_consistency(self.consistency).averages
        tokenizer = (shape.tokenizer or "bytes") if self.tokenizer is None else self.tokenizer
        entries = bpe.size_of(tokenizer)
        own_wire = self.precision if self.precision in ("fp16", "bf16") and self.strategy != "single" else None
        derived = {
            "seq_len": shape.seq_len if self.seq_len is None else self.seq_len,
            # In full, so that a checkpoint does not depend on a default.
            "tokenizer": tokenizer if entries is None else f"bpe:{entries}",
            "lr": shape.learning_rate if self.lr is None else self.lr,
            "max_grad_norm": float(lockstep) if self.max_grad_norm is None else self.max_grad_norm,
            "eval_every": 100 * lockstep if self.eval_every is None else self.eval_every,
            "sample": (200 if tokenizer == "bytes" else 60) if self.sample is None else self.sample,
            "steps": 200 if self.steps is None and self.epochs is None else self.steps,
            "wire": own_wire if self.wire is None else None if self.wire == "none" else self.wire,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the one moment before the object is frozen
        self.options.check(self.strategy, spelling=Flags())
        if not lockstep:
            self._require_no_common_step()

    def _require_no_common_step(self) -> None:
        """UsageError for what the trainer does between two steps of all workers: under ssp and asp there is no such
        moment."""
        for flag, value, why in (
            ("--eval-every", self.eval_every, "workers are never at the same step before the end; give 0"),
            ("--checkpoint-every", self.checkpoint_every, "workers are never at the same step; leave it out"),
            ("--resume", self.resume, "there are no checkpoints; leave it out"),
        ):
            if value:
                raise UsageError(f"{flag} can't be had under --consistency {self.consistency}: {why}")

    @classmethod
    def from_argv(cls, argv: Sequence[str] | None = None, *, speak: bool = True) -> Config:
        """Read the flags (sys.argv's where None), and the file of --config. --help, --version and --print-config print,
        where ``speak``, and leave with exit code 0."""
        line = parse(
            cls,
            argv,
            usage="mpirun -n RANKS python -m commlab.train [flags]",
            description="Train GPT-2 on real text, data-parallel over all ranks of mpirun or torchrun.",
            speak=speak,
        )
        if line.config is None:
            config = cls(**line.values)
        else:
            values = config_file.merged(config_file.read(line.config, cls), line.values)
            try:
                config = cls(**values)
            except UsageError as error:
                raise UsageError(f"{error} (flags, and --config {line.config!r})") from error
            for flag, path in (("--metrics", config.metrics), ("--trace", config.trace)):
                if path is not None and os.path.realpath(path) == os.path.realpath(line.config):
                    raise UsageError(f"{flag} {path!r} is the file of --config, and would replace it; give another one")
        if line.print_config:
            if speak:
                show(config_file.rendered(config))
            raise SystemExit(0)
        return config

    def validate_for(self, size: int) -> None:
        """Check what depends on the number of ranks; the same on every rank, so all of them raise."""
        self.options.check(self.strategy, size, Flags())
        workers = size - (self.servers or 0)
        micro_batches = workers * self.grad_accumulation
        if self.batch_size % micro_batches:
            accumulated = f" x {self.grad_accumulation} micro-batches" if self.grad_accumulation > 1 else ""
            raise UsageError(
                f"--batch-size {self.batch_size} can't be dealt equally to {workers}"
                f" {'ranks' if self.servers is None else 'workers'}{accumulated};"
                f" the nearest that can: {_multiples_around(self.batch_size, micro_batches)}"
            )
        if self.nodes is not None:
            declared(self.nodes, size)

    def rank_batch_size(self, size: int) -> int:
        """Sequences per rank and step, over its micro-batches."""
        return self.batch_size // size

    def total_steps(self, steps_per_epoch: int) -> int:
        """When to stop, in optimizer steps."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def lr_factor(self, step: int, total_steps: int) -> float:
        """The factor of the peak learning rate at ``step`` (from 0), for LambdaLR: a linear rise, as in the paper, a
        plateau, and a linear fall over the last fifth, without which short runs end 0.1 bits per byte worse
        (docs/data.md)."""
        warmup = min(1000, total_steps // 10) if self.warmup_steps is None else self.warmup_steps
        return max(0.0, min(1.0, (step + 1) / (warmup + 1), (total_steps - step) / (total_steps / 5)))

    @property
    def options(self) -> Options:
        """What the flags choose for :func:`commlab.strategy`."""
        return Options(
            algorithm=self.algorithm,
            precision=self.precision,
            autocast=self.autocast,
            loss_scale=LossScale(
                self.loss_scale, self.loss_scale_growth, self.loss_scale_backoff, self.loss_scale_interval
            ),
            apex_level=self.apex_level,
            wire=self.wire,
            max_grad_norm=self.max_grad_norm or None,
            nonfinite=self.nonfinite,
            buffers=self.buffers,
            check_replicas=self.check_replicas,
            bucket_bytes=self.bucket_bytes,
            overlap=self.overlap == "on",
            shard=self.shard,
            servers=self.servers,
            consistency=self.consistency,
            overlap_pulls=self.overlap_pulls == "on",
        )

    @property
    def lockstep(self) -> bool:
        """Whether all ranks that train make each step together."""
        return parse_consistency(self.consistency).averages

    @property
    def bucket_bytes(self) -> int | None:
        return None if self.bucket_mb is None else max(1, int(self.bucket_mb * 2**20))

    def thread_count(self, local_size: int, cores: int | None = None) -> tuple[int, str]:
        """(torch threads for this rank, why so many). ``cores``: what the ranks of the node can keep busy together;
        default: what this process alone can. A rank never has more threads than cores of its own."""
        if self.threads is not None:
            return self.threads, "--threads"
        wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if wanted.isdecimal() and int(wanted):
            return int(wanted), "OMP_NUM_THREADS"
        own = usable_cores()
        cores = own if cores is None else cores
        share = max(1, cores // local_size)
        if own < share:
            return own, f"{own} cores of this rank's own"
        return share, f"{cores} cores / {local_size} local ranks"

    @property
    def sample_s(self) -> float:
        """The most that generating may take; the other ranks wait for it."""
        return min(5.0, self.timeout / 4)

    @property
    def tokenizer_cache(self) -> Path:
        """Folder of tokenizers that were learned from texts."""
        return cache_folder("tokenizers")

    @property
    def checkpoint_folder(self) -> str:
        return self.checkpoint_dir if self.checkpoint_dir is not None else str(Path(self.output, "checkpoints"))

    @property
    def written(self) -> tuple[str, ...]:
        """The files and folders that the run writes."""
        paths = (self.output, self.checkpoint_folder, self.tensorboard, self.metrics, self.trace)
        return tuple(path for path in paths if path is not None)

    def shaping(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was saved, beside the text and its order; how ranks
        communicate, and when to stop, may change."""
        names = ("model", "tokenizer", "seq_len", "dropout", "lr", "warmup_steps", "weight_decay", "max_grad_norm")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Every field, for the metrics file."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _multiples_around(value: int, unit: int) -> str:
    """The positive multiples of ``unit`` next to ``value``, as text."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
