"""``python -m bench.precision``: whole training runs that differ in precision and wire alone, and where they end.

Each is ``mpirun -n RANKS python -m commlab.train``, with the same data, seeds and steps; what counts is the held-out
loss beside that of fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .core import results, table
from .core.mpirun import find_mpi, mpirun_environment
from .core.ranks import Ranks

STRATEGIES = ("single", "allreduce", "dps", "ps", "ddp", "horovod")
PRECISIONS = ("fp32", "bf16", "fp16", "apex")
TOLERANCE = 0.01


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.precision", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["allreduce", "dps"])
    found.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16", "fp16"])
    found.add_argument("--ranks", type=int, default=2)
    found.add_argument("--steps", type=int, default=300)
    found.add_argument("--autocast", choices=("auto", "on", "off"), default="off")
    found.add_argument("--train", nargs="*", default=[], metavar="WORD", help="flags of commlab.train: name value ...")
    found.add_argument("--limit", type=float, default=3600.0, metavar="S", help="for one run")
    found.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    return found


def train(strategy: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one run."""
    words = ["--strategy", strategy, "--precision", precision, "--steps", str(options.steps), "--eval-every", "0"]
    words += ["--sample", "0"]
    words += ["--autocast", options.autocast] if precision in ("bf16", "fp16") else []
    for flag, value in zip(options.train[::2], options.train[1::2], strict=True):
        words += [f"--{flag}", value]
    row: dict[str, Any] = {"type": "row", "strategy": strategy, "precision": precision, "steps": options.steps}
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        files = ["--output", str(Path(folder, "model")), "--metrics", str(metrics)]
        command = [sys.executable, "-m", "commlab.train", *words, *files]
        environment = dict(os.environ)
        if options.ranks > 1:
            mpi = find_mpi()
            command, environment = [mpi.mpirun, "-n", str(options.ranks), *command], mpirun_environment(mpi)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=options.limit)
        except subprocess.TimeoutExpired:
            return {**row, "missing": f"it took longer than {options.limit:g} s"}
        if done.returncode:
            return {**row, "missing": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it failed"}
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    summary = next(line["summary"] for line in lines if "summary" in line)
    config = next(line["config"] for line in lines if "config" in line)
    steps = [line for line in lines if "loss_scale" in line]
    return {
        **row,
        "wire": config["wire"] or "as is",
        "autocast": options.autocast if precision in ("bf16", "fp16") else "off",
        "device": config["device"],
        "model": config["model"],
        "skipped_steps": steps[-1]["skipped_steps"],
        "loss_scale": steps[-1]["loss_scale"],
        **{name: summary[name] for name in ("tokens_per_s", "first_loss", "last_loss", "held_out_bits_per_byte")},
    }


HEAD = ("strategy", "precision", "wire", "autocast", "held-out bits per byte", "/ fp32", "skipped", "tokens/s")


def rendered(rows: list[dict[str, Any]]) -> str:
    found = {row["strategy"]: row for row in rows if row["precision"] == "fp32" and "missing" not in row}
    cells = []
    for row in rows:
        if "missing" in row:
            cells.append((f"{row['strategy']}, {row['precision']}: {row['missing']}",))
            continue
        bits, fp32 = row["held_out_bits_per_byte"], found.get(row["strategy"])
        ratio = "" if fp32 is None else f"{bits / fp32['held_out_bits_per_byte']:.4f}"
        words = row["strategy"], row["precision"], row["wire"], row["autocast"]
        cells.append((*words, f"{bits:.4f}", ratio, str(row["skipped_steps"]), f"{row['tokens_per_s']:,.0f}"))
    return table.render(HEAD, cells, left=(0, 1, 2, 3))


def main() -> int:
    options = parser().parse_args()
    run = results.describe(Ranks(), "bench.precision")
    run |= {"command": " ".join(run["command"].split()[3:]), "ranks": options.ranks}
    rows = []
    for strategy in options.strategies:
        for precision in options.precisions:
            print(f"{strategy}, {precision} ...", file=sys.stderr, flush=True)
            rows.append(train(strategy, precision, options))
            if options.json:
                results.append(options.json, [run, rows[-1]] if len(rows) == 1 else [rows[-1]])
    print(rendered(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
