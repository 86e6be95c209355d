"""The table of strategies: what is made of runs, which rows are missing and why, and the program as it is started."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import train
from bench.core import results
from bench.training.jobs import JobFailed, Launcher, Measured, _measured, _reason
from bench.training.rows import HEAD, ROWS, cells, missing, reduced
from commlab.strategies import STRATEGIES
from commlab.trainer.config import Config

ROOT = Path(__file__).resolve().parents[2]


def run(step_s: float = 1.0, **changes: Any) -> Measured:
    parts = {"compute_s": 0.6 * step_s, "exchange_s": 0.3 * step_s, "update_s": 0.1 * step_s}
    found = Measured(
        1000,
        step_s,
        **parts,
        loss=2.0,
        held_out_bits=4.0,
        bytes_sent=10**6,
        interface_bytes=None,
        memory_bytes=2**20,
        nodes=1,
        versions={},
    )
    return dataclasses.replace(found, **changes)


def test_all_strategies_have_a_row() -> None:
    options = train.parser().parse_args([])
    configs = [Config.from_argv(train.flags_of(name, options)) for name in ROWS]
    assert {config.strategy for config in configs} == set(STRATEGIES)
    apart = {"strategy": "dps", "precision": "fp32", "wire": "none", "loss_scale": 1.0}
    same = [dataclasses.replace(config, **apart) for config in configs]
    assert all(config == same[0] for config in same), "rows differ in strategy and precision alone"


def test_figures_are_medians_of_rounds_and_of_their_ratios() -> None:
    rounds = [run(step_s) for step_s in (1.0, 3.0, 2.0)]
    single = [run(step_s) for step_s in (4.0, 6.0, 2.0)]
    found = reduced("dps", 2, rounds, single, [])
    assert found["tokens_per_s"] == 500 and found["step_ms"] == 2000
    assert [found[f"{part}_ms"] for part in ("compute", "exchange", "update")] == [1200, 600, 200]
    assert found["speed_of_single"][0] == 2, "of 4, 2 and 1: not the ratio of the medians"
    assert found["exchange_update_samples_ms"] == [400, 1200, 800]
    assert found["wrong"] == 0 and found["bytes_sent"] == 10**6


def test_what_a_library_hides_in_backward_is_seen_against_another_computation() -> None:
    own = run(2.0, compute_s=1.7, exchange_s=0.01, update_s=0.1, interface_bytes=5e6)
    found = reduced("horovod", 2, [own], [], [run(1.0)])
    assert (found["compute_ms"], found["exchange_ms"], found["update_ms"]) == (600, 1300, 100)
    assert found["exchange_is"] != "measured" and found["bytes_sent"] is None
    shown = dict(zip(HEAD, cells(found), strict=True))
    assert (shown["compute"], shown["exchange"], shown["sent MB"], shown["link MB"]) == ("~600.0", "~1300.0", "", "5")
    assert "speed_of_single" not in found


def test_another_loss_is_wrong() -> None:
    found = reduced("ps", 2, [run(loss=2.1)], [run()], [])
    assert found["wrong"] == 1
    assert cells(found)[HEAD.index("loss")] == "2.1000 WRONG"


def test_a_run_as_the_metrics_tell_it() -> None:
    step = {"tokens": 8, "forward_s": 1.0, "backward_s": 2.0, "exchange_s": 3.0, "update_s": 4.0, "loss": 1.0}
    lines = [{"nodes": 2, "versions": {}}]
    lines += [{**step, "step_s": step_s, "interface_bytes_sent": 7} for step_s in (90.0, 80.0, 10.0, 12.0, 11.0)]
    summary = {"last_loss": 1.5, "held_out_bits_per_byte": 2.5, "bytes_sent_per_rank_and_step": [5, 6]}
    lines.append({"summary": {**summary, "memory_bytes_per_rank": [1, 2]}})
    found = _measured(lines)
    assert (found.step_s, found.bytes_sent, found.interface_bytes, found.memory_bytes) == (11.0, 6, 7, 3)
    assert (found.compute_s, found.exchange_s, found.update_s) == (3.0, 3.0, 4.0)
    for line, wait_s in zip(lines[1:6], (9, 9, 1, 5, 0.5), strict=True):
        line |= {"slowest_compute_s": 3.0 + wait_s, "waited_s": min(3.0, wait_s)}
    found = _measured(lines)
    assert (found.compute_s, found.exchange_s) == (4.0, 2.0), "what is waited for a slower rank is its computation"


def test_reasons() -> None:
    assert _reason("step 1\rstep 2\ncommlab: strategy horovod needs Horovod\nmore\n", 2) == (
        "strategy horovod needs Horovod"
    )
    assert _reason("step 1\rKilled\n\n", 137) == "exit code 137: Killed"
    assert _reason("", 1) == "exit code 1: it said nothing"


def test_runs_alternate_and_a_missing_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def fake(_: Launcher, ranks: int, flags: Sequence[str]) -> Measured:
        config = Config.from_argv(flags)
        started.append(f"{config.strategy} {config.precision} {ranks}")
        if config.strategy == "horovod":
            raise JobFailed("strategy horovod needs Horovod")
        return run()

    monkeypatch.setattr(train, "train", fake)
    options = train.parser().parse_args(["--ranks", "2,4", "--rounds", "3"])
    runs, reasons = train.measure(None, options)  # type: ignore[arg-type]
    counts = Counter(started)
    assert counts["single fp32 1"] == 3 and counts["dps fp32 2"] == counts["dps fp16 4"] == 3
    assert counts["horovod fp32 2"] == 1, "not tried again"
    names = [name for name in started[:15] if not name.startswith("horovod")]
    assert sorted(names) == sorted(set(names)), "each once in the first round"
    found = train.results(runs, reasons)
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
