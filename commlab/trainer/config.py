"""What one run does: knobs that were checked together, the defaults that depend on others, and what follows. The only
reader of argv.

Importing this loads neither torch nor numpy, so that a mistyped flag is reported at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..job.cache import cache_folder
from ..job.topology import declared, usable_cores
from ..ps.consistency import parse as parse_consistency
from .data import bpe
from .flags import check_fields, parse
from .knobs import Knobs
from .model import describe_model

_OWN_SCHEDULES = ("ps", "dps", "allreduce")

ADAMW_BETAS = (0.9, 0.95)
"""For the trainer's AdamW: 3.16 held-out bits per byte after the default run; torch's own 0.999 ends at 3.20
(docs/data.md)."""


@dataclass(frozen=True)
class Config(Knobs):
    """What one run does. Made by `from_argv` or directly, and checked either way.

    Where a default depends on the model, None stands for it and is replaced when the object is made: `seq_len`, `lr`,
    `max_grad_norm`, `eval_every` and `sample` are never None afterwards, and `wire` is None (as they are), "fp16" or
    "bf16".
    Errors: UsageError, saying what was given, what is allowed, and what to do.
    """

    def __post_init__(self) -> None:
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
        if self.algorithm != "auto" and self.strategy not in _OWN_SCHEDULES:
            raise UsageError(
                f"--algorithm {self.algorithm} has no meaning for --strategy {self.strategy};"
                f" leave it out, or take one of {', '.join(_OWN_SCHEDULES)}"
            )
        if self.overlap == "off" and self.strategy not in _OWN_SCHEDULES:
            raise UsageError(
                f"--overlap off has no meaning for --strategy {self.strategy}, which sends no buckets of commlab's;"
                f" leave it out, or take one of {', '.join(_OWN_SCHEDULES)}"
            )
        if self.strategy == "single" and self.wire not in (None, "none"):
            raise UsageError(
                f"--wire {self.wire} has no meaning for --strategy single, which sends nothing; leave it out"
            )
        if self.autocast == "on" and self.precision in ("fp32", "apex"):
            raise UsageError("--autocast on needs a 16-bit format: give --precision bf16 or fp16")
        if self.apex_level is not None and self.precision != "apex":
            raise UsageError(f"--apex-level {self.apex_level} has no meaning for --precision {self.precision}")
        lockstep = self._check_servers()
        entries = bpe.size_of(self.tokenizer)
        own_wire = self.precision if self.precision in ("fp16", "bf16") and self.strategy != "single" else None
        derived = {
            "seq_len": shape.seq_len if self.seq_len is None else self.seq_len,
            # In full, so that a checkpoint does not depend on a default.
            "tokenizer": self.tokenizer if entries is None else f"bpe:{entries}",
            "lr": shape.learning_rate if self.lr is None else self.lr,
            "max_grad_norm": float(lockstep) if self.max_grad_norm is None else self.max_grad_norm,
            "eval_every": 100 * lockstep if self.eval_every is None else self.eval_every,
            "sample": (200 if self.tokenizer == "bytes" else 60) if self.sample is None else self.sample,
            "steps": 200 if self.steps is None and self.epochs is None else self.steps,
            "wire": own_wire if self.wire is None else None if self.wire == "none" else self.wire,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the one moment before the object is frozen

    def _check_servers(self) -> bool:
        """Whether all workers make each step together."""
        consistency = parse_consistency(self.consistency)
        if self.servers is None:
            if self.consistency != "bsp":
                raise UsageError(
                    f"--consistency {self.consistency} needs ranks that only serve: give --servers 1 with --strategy"
                    " ps, or --servers 2 or more with dps"
                )
            return True
        if self.strategy not in ("ps", "dps") or (self.strategy == "ps") != (self.servers == 1):
            raise UsageError(
                f"--servers {self.servers} with --strategy {self.strategy}: ps has 1 server, dps 2 or more, and the"
                " others have none"
            )
        if self.algorithm != "auto":
            raise UsageError(
                f"--algorithm {self.algorithm} is for collectives, and workers send --servers messages; leave it out"
            )
        if consistency.averages:
            return True
        for flag, given, why in (
            ("--max-grad-norm", self.max_grad_norm, "every push is applied alone, so there is no global norm; give 0"),
            ("--eval-every", self.eval_every, "workers are never at the same step before the end; give 0"),
            ("--checkpoint-every", self.checkpoint_every, "workers are never at the same step; leave it out"),
            ("--resume", self.resume, "it has no checkpoints; leave it out"),
            ("--precision fp16", self.precision == "fp16", "workers can't agree to skip a step; give bf16"),
        ):
            if given:
                raise UsageError(f"{flag} can't be had under --consistency {self.consistency}: {why}")
        return False

    @classmethod
    def from_argv(cls, argv: Sequence[str] | None = None, *, speak: bool = True) -> Config:
        """Read the flags (sys.argv's where None).

        --help and --version print, where `speak`, and leave with exit code 0.
        """
        given = parse(
            cls,
            argv,
            usage="mpirun -n RANKS python -m commlab.train [flags]",
            description="Train GPT-2 on real text, data-parallel over all ranks of mpirun or torchrun.",
            speak=speak,
        )
        return cls(**given)

    def validate_for(self, size: int) -> None:
        """Check what depends on the number of ranks; the same on every rank, so all of them raise."""
        if self.strategy == "single" and size > 1:
            raise UsageError(
                f"--strategy single runs on 1 rank, but {size} were started; leave mpirun out, or take another strategy"
            )
        if self.servers is not None and self.servers >= size:
            raise UsageError(
                f"--servers {self.servers} of {size} rank{'s' * (size > 1)} leave none to train; start more ranks, or "
                "give fewer servers"
            )
        size -= self.servers or 0
        parts = size * self.grad_accumulation
        if self.batch_size % parts:
            accumulated = f" x {self.grad_accumulation} micro-batches" if self.grad_accumulation > 1 else ""
            workers = "ranks" if self.servers is None else "workers"
            raise UsageError(
                f"--batch-size {self.batch_size} can't be dealt equally to {size} {workers}{accumulated};"
                f" the nearest that can: {_multiples_around(self.batch_size, parts)}"
            )
        if self.nodes is not None:
            declared(self.nodes, size + (self.servers or 0))

    def rank_batch_size(self, size: int) -> int:
        """Sequences per rank and step, over its micro-batches."""
        return self.batch_size // size

    def total_steps(self, steps_per_epoch: int) -> int:
        """When to stop, in optimizer steps."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate at `step` (from 0), for LambdaLR: a linear rise, as in the paper, a plateau,
        and a linear fall over the last fifth, without which short runs end 0.1 bits per byte worse (docs/data.md)."""
        warmup = min(1000, total_steps // 10) if self.warmup_steps is None else self.warmup_steps
        return max(0.0, min(1.0, (step + 1) / (warmup + 1), (total_steps - step) / (total_steps / 5)))

    @property
    def bucket_bytes(self) -> int | None:
        return None if self.bucket_mb is None else max(1, int(self.bucket_mb * 2**20))

    def thread_count(self, local_size: int) -> tuple[int, str]:
        """(torch threads for this rank, why so many)."""
        if self.threads is not None:
            return self.threads, "--threads"
        cores = usable_cores()
        return max(1, cores // local_size), f"{cores} cores / {local_size} local ranks"

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

    def shaping(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was saved, beside the text and its order; how ranks
        communicate, and when to stop, may change."""
        names = ("model", "tokenizer", "seq_len", "dropout", "lr", "warmup_steps", "weight_decay", "max_grad_norm")
        return {name: getattr(self, name) for name in names}

    def check_outputs(self) -> None:
        """Whether the output paths can be written: found before training, on the rank that writes, not after it."""
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise UsageError(
                f"--output {self.output!r} is a file; give a folder, which is made where it does not exist"
            )
        if self.tensorboard is not None and find_spec("tensorboard") is None:
            raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out")
        for flag, path in (("--metrics", self.metrics), ("--trace", self.trace)):
            if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
                what = (
                    "is a folder"
                    if Path(path).is_dir()
                    else f"lies in {str(Path(path).parent)!r}, which is not a folder"
                )
                raise UsageError(f"{flag} {path!r} {what}; give the name of a file in a folder that exists")

    def as_dict(self) -> dict[str, Any]:
        """Every field, for the metrics file."""
        return dataclasses.asdict(self)


def _multiples_around(value: int, unit: int) -> str:
    """The positive multiples of `unit` next to `value`, as text."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
