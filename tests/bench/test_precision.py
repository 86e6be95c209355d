"""bench.precision: the flags and the records of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import precision
from bench.core import results
from bench.training.jobs import JobFailed, Launcher
from commlab.trainer.config import Config


def test_runs_become_records_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each record is written once its run has ended; one that failed says why, and the others go on."""
    file = tmp_path / "r.jsonl"
    written: list[int] = []

    def fake(starter: Launcher, ranks: int, flags: Sequence[str]) -> list[dict[str, Any]]:
        written.append(len(file.read_text().splitlines()) if file.exists() else 0)
        if "horovod" in flags:
            raise JobFailed("strategy horovod needs Horovod")
        config = Config.from_argv(flags)
        summary = {"tokens_per_s": 5.0, "first_loss": 4.0, "last_loss": 3.0}
        summary["held_out_bits_per_byte"] = 2.0 if config.precision == "fp32" else 2.5
        step = {"loss_scale": 8.0, "skipped_steps": 1}
        opening = {"strategy": config.strategy, "precision": config.precision, "wire": None, "model": config.model}
        opening |= {"autocast": config.autocast, "device": "cpu"}
        return [{"config": opening}, step, step, {"summary": summary}]

    monkeypatch.setattr(precision, "metrics", fake)
    flags = ["--strategies", "single", "horovod", "--precisions", "fp32", "bf16", "--ranks", "1", "--steps", "7"]
    assert precision.PROGRAM.main([*flags, "--train", "eval-batches", "1", "--json", str(file)]) == 0
    assert written == [0, 2, 3, 4], "the run line comes with the first record"
    ((about, found),) = results.read(file)
    assert about["bench"] == "bench.precision" and about["ranks"] == 1 and about["versions"]["torch"]
    assert [record.get("missing") for record in found] == [None, None, *["strategy horovod needs Horovod"] * 2]
    assert [record["held_out_bits_per_byte"] for record in found[:2]] == [2.0, 2.5]
    assert found[1]["autocast"] == "off" and found[1]["wire"] == "as is" and found[1]["skipped_steps"] == 1
    shown = capsys.readouterr().out
    assert "1.2500" in shown and "horovod, fp32: strategy horovod needs Horovod" in shown


def test_flags_are_the_trainers() -> None:
    options = precision.PROGRAM.parser().parse_args(["--steps", "7", "--train", "batch-size", "4"])
    config = Config.from_argv(precision.flags_of("dps", "bf16", options))
    assert (config.strategy, config.precision, config.steps, config.batch_size) == ("dps", "bf16", 7, 4)
