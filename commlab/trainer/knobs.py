"""Every knob of the trainer on one page: flag, unit, default, and what it does. :mod:`.config` has what knobs may be
together, and what follows from them.

Importing this loads neither torch nor numpy, so that a mistyped flag is reported at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..job.launch import LONGEST_S
from ..strategies.options import KNOWN
from .data import bpe
from .display import MODES as PROGRESS
from .flags import knob
from .model import PRESETS

_HOW, _NUMBERS, _WHAT, _TRAIN, _SHOW, _MACHINE = (
    "strategy and communication",
    "numbers",
    "model and data",
    "training",
    "evaluation and output",
    "machine",
)


_MOST_THREADS = 4096
"""More than any machine has cores; far more end the process, where threads can't be had."""


@dataclass(frozen=True)
class Knobs:
    """One field per flag. None: the value depends on other knobs (:class:`.config.Config`)."""

    strategy: str = knob("dps", _HOW, "how gradients become agreed updates", choices=KNOWN["strategy"])
    algorithm: str = knob(
        "auto", _HOW, "schedule of the collectives, for ps, dps and allreduce", choices=KNOWN["algorithm"]
    )
    transport: str = knob("mpi", _HOW, "what moves bytes between ranks", choices=("mpi", "torch"))
    window: str = knob("auto", _HOW, "memory shared by the ranks of a node", choices=("auto", "on", "off"))
    links: str = knob(
        "auto",
        _HOW,
        "what joins several nodes: tcp = connections of our own, mpi = the transport itself, auto = the faster",
        choices=("auto", "tcp", "mpi"),
    )
    iface: str | None = knob(
        None, _HOW, "network interfaces that links use, as eth0 or eth0,eth1 (default: the first that answers)"
    )
    nodes: str | None = knob(
        None,
        _HOW,
        "ranks that share a node, by hand: ranks per node (2) or a range for each (0-3,4-7) (default: as launched)",
    )
    servers: int | None = knob(
        None,
        _HOW,
        "ranks that only serve parameters: 1 for ps, 2 or more for dps (default: none; every rank trains and serves)",
        int,
    )
    consistency: str = knob(
        "bsp", _HOW, "when a worker may read, with --servers: bsp (lockstep), ssp:S (S steps apart), asp (never wait)"
    )
    overlap_pulls: str = knob(
        "on",
        _HOW,
        "with --servers, let parameters travel during the next forward, which waits for each where it reads it; off:"
        " wait for all at the end of a step",
        choices=("on", "off"),
    )
    bucket_mb: float | None = knob(
        None,
        _HOW,
        "size of a bucket, in MB of 2^20 bytes (default: 25; between nodes a quarter of all gradients, 1 to 25, from 5"
        " Gbit/s on 4 to 25; ddp has torch's own)",
        float,
        above=0,
    )
    overlap: str = knob(
        "on",
        _HOW,
        "for ps, dps and allreduce, send buckets while backward goes on; off: once it has ended",
        choices=("on", "off"),
    )
    shard: str = knob(
        "auto",
        _HOW,
        "for ps and dps on several nodes, what pushes and pulls as one: node = the ranks of each node, which has one"
        " copy of the parameters; job = every rank for itself; auto = node where nodes share memory",
        choices=KNOWN["shard"],
    )
    buffers: str = knob(
        "broadcast",
        _HOW,
        "what becomes of buffers that forward writes: broadcast = all ranks get rank 0's after each step; mean; local",
        choices=KNOWN["buffers"],
    )
    check_replicas: int = knob(
        100,
        _HOW,
        "steps between two comparisons of the copies that ranks have; 0 = before evaluations and saves alone",
        int,
        least=0,
    )
    wire: str | None = knob(
        None,
        _HOW,
        "how numbers travel (default: the 16-bit format of --precision fp16 or bf16, otherwise none = as they are)",
        choices=tuple(name or "none" for name in KNOWN["wire"]),
    )
    nonfinite: str = knob(
        "error",
        _NUMBERS,
        "what a step does whose gradient, norm or loss is inf or NaN, but for --precision fp16 and apex, which skip it:"
        " error = the run ends; skip = no update; torch = as torch's clip_grad_norm_",
        choices=KNOWN["nonfinite"],
    )
    precision: str = knob("fp32", _NUMBERS, "what is computed in", choices=KNOWN["precision"])
    loss_scale: float = knob(
        2.0**16, _NUMBERS, "what the loss is multiplied by at first, for --precision fp16 and apex", float, least=1
    )
    loss_scale_interval: int = knob(
        2000, _NUMBERS, "good steps in a row after which the loss scale grows", int, least=1
    )
    loss_scale_growth: float = knob(2.0, _NUMBERS, "factor by which it grows then", float, least=1)
    loss_scale_backoff: float = knob(
        0.5, _NUMBERS, "factor by which it falls when a step has overflowed", float, above=0, below=1
    )
    apex_level: str | None = knob(
        None,
        _NUMBERS,
        "for --precision apex: of apex.amp, where Apex has it (default: none)",
        choices=tuple(name for name in KNOWN["apex_level"] if name),
    )
    autocast: str = knob(
        "auto", _NUMBERS, "16-bit matrix products; auto = where they are fast", choices=KNOWN["autocast"]
    )
    model: str = knob(
        "gpt2-tiny",
        _WHAT,
        f"{', '.join(PRESETS)}; or the path of a transformers GPT-2 config.json, or of a model folder, whose weights"
        " training starts from",
    )
    data: str | tuple[str, ...] | None = knob(
        None,
        _WHAT,
        "text: files (plain, .json, .jsonl, also compressed), folders of them, datasets saved on disk; one or several"
        " (default: this Python's own library sources)",
        many=True,
    )
    text_field: str | None = knob(
        None, _WHAT, "field of JSON lines or column of a dataset that has the text (default: text, or the only one)"
    )
    tokenizer: str = knob(
        None,
        _WHAT,
        f"bytes; bpe or bpe:SIZE = learned from the text, SIZE entries ({bpe.DEFAULT_SIZE}); or the path of a"
        " tokenizer.json or tokenizer folder (default: the model folder's own, otherwise bytes)",
    )
    seq_len: int = knob(None, _WHAT, "tokens in a sequence (default: the model's; gpt2-tiny 128)", int, least=1)
    dropout: float | None = knob(
        None, _WHAT, "share of activations dropped (default: a config file's own, otherwise 0)", float, least=0, below=1
    )
    batch_size: int = knob(32, _TRAIN, "sequences in a global batch, over all ranks and micro-batches", int, least=1)
    grad_accumulation: int = knob(1, _TRAIN, "micro-batches to a step", int, least=1)
    steps: int | None = knob(None, _TRAIN, "optimizer steps (default: 200 where --epochs is not given)", int, least=1)
    epochs: int | None = knob(None, _TRAIN, "passes over the training text, instead of --steps", int, least=1)
    lr: float = knob(
        None,
        _TRAIN,
        "AdamW's peak learning rate; over the last fifth of the steps it falls in a line"
        f" (default: {PRESETS['gpt2-tiny'].learning_rate:g} for gpt2-tiny, otherwise the paper's 1.5e-4)",
        float,
        above=0,
    )
    warmup_steps: int | None = knob(
        None,
        _TRAIN,
        "steps in which the learning rate rises in a line (default: a tenth of all, 1000 at most)",
        int,
        least=0,
    )
    weight_decay: float = knob(0.01, _TRAIN, "AdamW's weight decay, per step and unit of learning rate", float, least=0)
    max_grad_norm: float = knob(
        None,
        _TRAIN,
        "the gradient's global norm is clipped to this; 0 = not clipped (default: 1; 0 under ssp and asp)",
        float,
    )
    seed: int = knob(0, _TRAIN, "of the weights and of the order of samples", int, least=0, below=2**32)
    eval_every: int = knob(
        None,
        _SHOW,
        "steps between two evaluations on held-out text; 0 = only after the last step (default: 100; 0 under ssp and"
        " asp)",
        int,
        least=0,
    )
    eval_batches: int = knob(
        16, _SHOW, "global batches in an evaluation, spread over all held-out text; 0 = all of it", int, least=0
    )
    sample: int = knob(
        None,
        _SHOW,
        "tokens that the trained model generates at the end, for you to read; 0 = none (default: about 200 bytes of"
        " text: 200 with the bytes tokenizer, otherwise 60)",
        int,
        least=0,
    )
    output: str = knob("commlab-model", _SHOW, "folder that the trained model is written to")
    metrics: str | None = knob(None, _SHOW, "file for one JSON line per step and evaluation (default: none)")
    tensorboard: str | None = knob(None, _SHOW, "folder for TensorBoard's event files (default: none)")
    checkpoint_every: int = knob(0, _SHOW, "steps between two checkpoints; 0 = none", int, least=0)
    checkpoint_dir: str | None = knob(
        None, _SHOW, "folder of the checkpoints, which all hosts see (default: checkpoints in --output)"
    )
    checkpoint_keep: int = knob(2, _SHOW, "how many of the newest checkpoints stay", int, least=1)
    resume: bool = knob(
        False, _SHOW, "go on from the newest whole checkpoint; with none at all, start at the beginning", bool
    )
    trace: str | None = knob(None, _SHOW, "file for the timeline of all ranks, for Perfetto (default: none)")
    progress: str = knob(
        "auto",
        _SHOW,
        "how progress is shown on standard error: bar; lines = one every --progress-every; none; auto = a bar on a"
        " terminal, otherwise lines",
        choices=PROGRESS,
    )
    progress_every: float = knob(10.0, _SHOW, "seconds between two lines of progress", float, above=0)
    timeout: float = knob(
        300.0, _MACHINE, "seconds of silence after which a peer counts as lost", float, above=0, most=LONGEST_S
    )
    device: str = knob(
        "auto", _MACHINE, "where the model is; auto = a GPU where torch sees one", choices=("auto", "cpu", "cuda")
    )
    compile: bool = knob(
        False, _MACHINE, "run the model through torch.compile, where this machine has a compiler", bool
    )
    threads: int | None = knob(
        None, _MACHINE, "torch threads per rank (default: cores / local ranks)", int, least=1, most=_MOST_THREADS
    )
