"""bench.train: which rows are missing and why, and the program as it is started."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from measured import measured

from bench import train
from bench.core import results
from bench.training.jobs import JobFailed, Launcher, Measured
from bench.training.rows import ROWS, cells, missing
from commlab.strategies import STRATEGIES
from commlab.trainer.config import Config

ROOT = Path(__file__).resolve().parents[2]


def test_all_strategies_have_a_row() -> None:
    options = train.PROGRAM.parser().parse_args([])
    configs = [Config.from_argv(train.flags_of(name, options)) for name in ROWS]
    assert {config.strategy for config in configs} == set(STRATEGIES)
    apart = {"strategy": "dps", "precision": "fp32", "wire": "none", "loss_scale": 1.0}
    same = [dataclasses.replace(config, **apart) for config in configs]
    assert all(config == same[0] for config in same), "rows differ in strategy and precision alone"


def test_runs_alternate_and_a_missing_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def fake(_: Launcher, ranks: int, flags: Sequence[str]) -> Measured:
        config = Config.from_argv(flags)
        started.append(f"{config.strategy} {config.precision} {ranks}")
        if config.strategy == "horovod":
            raise JobFailed("strategy horovod needs Horovod")
        return measured()

    monkeypatch.setattr(train, "train", fake)
    options = train.PROGRAM.parser().parse_args(["--ranks", "2,4", "--rounds", "3"])
    runs, reasons = train.runs_of(None, options)  # type: ignore[arg-type]
    counts = Counter(started)
    assert counts["single fp32 1"] == 3 and counts["dps fp32 2"] == counts["dps fp16 4"] == 3
    assert counts["horovod fp32 2"] == 1, "not tried again"
    names = [name for name in started[:15] if not name.startswith("horovod")]
    assert sorted(names) == sorted(set(names)), "each once in the first round"
    found = train.records(runs, reasons)
    assert len(found) == 1 + 2 * 7
    gone = [record for record in found if "missing" in record]
    assert [(record["contestant"], record["ranks"]) for record in gone] == [
        (name, ranks) for ranks in (2, 4) for name in ("horovod", "horovod 16-bit")
    ]
    assert cells(gone[0]) == ["horovod, 2 ranks: missing: strategy horovod needs Horovod"]
    assert missing("ddp", 2, "why")["missing"] == "why"


def test_the_program(tmp_path: Path) -> None:
    """Two jobs, alone and under mpirun, of a small model."""
    model = {"model_type": "gpt2", "vocab_size": 256, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    (tmp_path / "model.json").write_text(json.dumps(model))
    (tmp_path / "text.txt").write_text("".join(f"line {number} of {number**2}\n" for number in range(200)))
    command = [sys.executable, "-m", "bench.train", "--rows", "single,dps", "--rounds", "1", "--steps", "4"]
    command += ["--model", str(tmp_path / "model.json"), "--data", str(tmp_path / "text.txt"), "--batch-size", "4"]
    command += ["--flags=--threads 1 --dropout 0", "--json", str(tmp_path / "r.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    ((about, found),) = results.read(tmp_path / "r.jsonl")
    assert about["command"].startswith("python -m bench.train --rows single,dps")
    assert about["training"]["steps"] == 4 and about["versions"]["torch"]
    single, dps = found
    assert (single["contestant"], single["ranks"], dps["contestant"], dps["ranks"]) == ("single", 1, "dps", 2)
    assert abs(single["loss"] - dps["loss"]) < 1e-3 and dps["wrong"] == 0
    assert dps["memory_bytes"] > single["memory_bytes"] > 50 * 2**20
    assert all(f" {record['tokens_per_s']:,.0f} " in done.stdout for record in found)


def test_wrong_flags_end_it_before_the_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--flags", "--bath-size 3"]) == 2
    assert "unknown flag '--bath-size'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--rows", "dps,nothing"])
