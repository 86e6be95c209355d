"""``python -m bench.precision``: whole training runs that differ in precision and wire alone, and where they end.

Each is ``mpirun -n RANKS python -m commlab.train``, with the same data, seeds and steps; what counts is the held-out
loss beside that of fp32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from .core import results, table
from .core.mpirun import find_mpi
from .core.program import JobProgram, Section, WithDefaults
from .core.results import Record
from .training.jobs import JobFailed, Launcher, Line, metrics, summary_of

STRATEGIES = ("single", "allreduce", "dps", "ps", "ddp", "horovod")
PRECISIONS = ("fp32", "bf16", "fp16", "apex")
HEAD = ("strategy", "precision", "wire", "autocast", "held-out bits per byte", "/ fp32", "skipped", "tokens/s")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["allreduce", "dps"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16", "fp16"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--autocast", choices=("auto", "on", "off"), default="off")
    parser.add_argument("--train", nargs="*", default=[], metavar="WORD", help="flags of commlab.train: name value ...")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="S", help="for one run")


def measure(options: argparse.Namespace, run: Record) -> Iterator[Section]:
    """Records are written as soon as their run has ended; the table of all is shown at the end."""
    run["versions"] |= results.library_versions()
    run |= {"ranks": options.ranks, "hosts": 1, "link_bytes_per_s": 0.0}
    starter = Launcher(find_mpi() if options.ranks > 1 else None, options.limit)
    records = []
    for strategy in options.strategies:
        for precision in options.precisions:
            print(f"{strategy}, {precision} ...", file=sys.stderr, flush=True)
            records.append(trained(starter, strategy, precision, options))
            yield Section("", records[-1:])
    yield Section(rendered(records))


def flags_of(strategy: str, precision: str, options: argparse.Namespace) -> list[str]:
    """The trainer's flags of one run."""
    flags = ["--strategy", strategy, "--precision", precision, "--steps", str(options.steps), "--eval-every", "0"]
    flags += ["--sample", "0"]
    flags += ["--autocast", options.autocast] if precision in ("bf16", "fp16") else []
    for flag, value in zip(options.train[::2], options.train[1::2], strict=True):
        flags += [f"--{flag}", value]
    return flags


def trained(starter: Launcher, strategy: str, precision: str, options: argparse.Namespace) -> Record:
    """The record of one run."""
    record: Record = {"type": "row", "strategy": strategy, "precision": precision, "steps": options.steps}
    try:
        lines = metrics(starter, options.ranks, flags_of(strategy, precision, options))
    except JobFailed as failed:
        return {**record, "missing": str(failed)}
    return {**record, **ended(lines)}


def ended(lines: Sequence[Line]) -> Record:
    """The columns of a record that the metrics of the run have."""
    summary, config = summary_of(lines), next(line["config"] for line in lines if "config" in line)
    last_step = [line for line in lines if "loss_scale" in line][-1]
    return {
        "wire": config["wire"] or "as is",
        "autocast": config["autocast"] if config["precision"] in ("bf16", "fp16") else "off",
        "device": config["device"],
        "model": config["model"],
        "skipped_steps": last_step["skipped_steps"],
        "loss_scale": last_step["loss_scale"],
        **{name: summary[name] for name in ("tokens_per_s", "first_loss", "last_loss", "held_out_bits_per_byte")},
    }


def rendered(records: Sequence[Record]) -> str:
    """The records as a table, each beside its strategy's fp32."""
    found = {
        record["strategy"]: record for record in records if record["precision"] == "fp32" and "missing" not in record
    }
    cells: list[tuple[str, ...]] = []
    for record in records:
        if "missing" in record:
            cells.append((f"{record['strategy']}, {record['precision']}: {record['missing']}",))
            continue
        bits, fp32 = record["held_out_bits_per_byte"], found.get(record["strategy"])
        ratio = "" if fp32 is None else f"{bits / fp32['held_out_bits_per_byte']:.4f}"
        words = record["strategy"], record["precision"], record["wire"], record["autocast"]
        cells.append((*words, f"{bits:.4f}", ratio, str(record["skipped_steps"]), f"{record['tokens_per_s']:,.0f}"))
    return table.render(HEAD, cells, left=(0, 1, 2, 3))


PROGRAM = JobProgram("bench.precision", __doc__, arguments, measure, WithDefaults)


def main(argv: Sequence[str] | None = None) -> int:
    return PROGRAM.main(argv)


if __name__ == "__main__":
    sys.exit(main())
