"""Flags: what each error says, what the defaults are, and what depends on the number of ranks."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlab.collectives.select import CHOICES
from commlab.errors import UsageError
from commlab.job.topology import usable_cores
from commlab.strategies import STRATEGIES
from commlab.trainer.config import Config
from commlab.trainer.model import PRESETS


def flags(text: str) -> Config:
    return Config.from_argv(text.split())


def test_defaults() -> None:
    config = flags("")
    assert config == Config()
    assert (config.strategy, config.algorithm, config.transport, config.wire) == ("dps", "auto", "mpi", None)
    assert (config.model, config.tokenizer, config.data, config.seq_len) == ("gpt2-tiny", "bytes", None, 128)
    assert (config.batch_size, config.steps, config.epochs, config.timeout) == (32, 200, None, 300)
    assert config.lr == PRESETS["gpt2-tiny"].learning_rate
    assert (config.sample, flags("--tokenizer bpe").sample, flags("--sample 0").sample) == (200, 60, 0)
    assert config.bucket_bytes is None
    assert flags("--model gpt2-100m").lr == 1.5e-4
    assert flags("--model gpt2-100m").seq_len == 512


def test_every_field_can_be_given(tmp_path: Path) -> None:
    given = {
        "strategy": "allreduce", "algorithm": "ring", "transport": "torch", "window": "off", "nodes": "0-1,2-3",
        "links": "tcp", "iface": "eth0",
        "progress": "none", "progress_every": 2.5,
        "bucket_mb": 0.5, "wire": "bf16", "precision": "bf16", "autocast": "on", "model": "gpt2", "data": "a.txt",
        "tokenizer": "tokenizer.json", "seq_len": 77, "dropout": 0.1, "batch_size": 24, "grad_accumulation": 3,
        "steps": 7, "lr": 1e-2, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 0.0, "seed": 11,
        "eval_every": 5, "eval_batches": 0, "sample": 9, "output": "out", "metrics": "m.jsonl", "trace": "t.json",
        "timeout": 1.5, "threads": 3, "checkpoint_every": 4, "checkpoint_dir": "c", "checkpoint_keep": 5,
        "tensorboard": "b", "device": "cpu",
        "loss_scale": 256.0, "loss_scale_interval": 9, "loss_scale_growth": 4.0, "loss_scale_backoff": 0.25,
        "overlap": "off", "overlap_pulls": "off", "nonfinite": "skip", "buffers": "mean", "check_replicas": 7,
    }  # fmt: skip
    argv = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]
    wanted = {
        **given,
        "data": ["a.txt"],
        "shard": "auto",
        "text_field": None,
        "compile": False,
        "epochs": None,
        "resume": True,
        "servers": None,
        "consistency": "bsp",
        "apex_level": None,
    }
    assert Config.from_argv([*argv, "--resume"]).as_dict() == wanted
    assert json.loads(json.dumps(Config.from_argv([*argv, "--resume"]).as_dict())) == wanted
    assert flags("--epochs 2").steps is None


def test_servers() -> None:
    assert (flags("").max_grad_norm, flags("").eval_every) == (1.0, 100)
    lockstep = flags("--strategy ps --servers 1")
    assert (lockstep.servers, lockstep.max_grad_norm, lockstep.eval_every) == (1, 1.0, 100)
    free = flags("--strategy dps --servers 2 --consistency ssp:4")
    assert (free.servers, free.consistency, free.max_grad_norm, free.eval_every) == (2, "ssp:4", 0.0, 0)
    flags("--strategy dps --servers 2 --batch-size 6").validate_for(5)
    with pytest.raises(UsageError, match=r"--servers 2 of 2 ranks leave none to train"):
        flags("--servers 2").validate_for(2)
    with pytest.raises(UsageError, match=r"--batch-size 32 can't be dealt equally to 3 workers.* 30 or 33"):
        flags("--strategy ps --servers 1").validate_for(4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--strategy alreduce", ["unknown strategy 'alreduce'", *STRATEGIES, "did you mean allreduce?"]),
        ("--algorithm rng", ["unknown algorithm 'rng'", *CHOICES, "did you mean ring?"]),
        ("--servers 1", ["--servers 1 with --strategy dps", "ps has 1 server, dps 2 or more"]),
        ("--servers 2 --strategy allreduce", ["--servers 2 with --strategy allreduce"]),
        ("--consistency asp", ["--consistency asp needs", "--servers 1 with --strategy ps"]),
        ("--servers 2 --consistency sps", ["unknown consistency 'sps'", "bsp", "ssp:4", "asp"]),
        ("--servers 2 --algorithm ring", ["--algorithm ring", "leave it out"]),
        (
            "--servers 2 --consistency asp --max-grad-norm 1",
            ["no global norm", "give --max-grad-norm 0"],
        ),
        ("--servers 2 --consistency asp --checkpoint-every 5", ["--checkpoint-every", "never at the same step"]),
        ("--servers 2 --consistency ssp:1 --resume", ["--resume", "no checkpoints"]),
        ("--servers 2 --consistency asp --eval-every 5", ["--eval-every", "give 0"]),
        ("--servers 2 --consistency asp --precision fp16", ["--precision fp16", "give --precision bf16"]),
        ("--transport tcp", ["unknown transport 'tcp'", "mpi, torch"]),
        ("--wire fp8", ["unknown wire 'fp8'", "none, fp16, bf16"]),
        ("--precision double", ["unknown precision 'double'", "fp32, bf16, fp16, apex"]),
        ("--model gpt2-100", ["unknown model 'gpt2-100'", *PRESETS, "did you mean 'gpt2-100m'?"]),
        ("--batch-siz 8", ["unknown flag '--batch-siz'", "did you mean --batch-size?", "--help"]),
        ("--bath-size=8", ["unknown flag '--bath-size=8'", "did you mean --batch-size?"]),
        ("train", ["unknown flag 'train'"]),
        ("--batch-size", ["--batch-size", "expected one argument"]),
        ("--batch-size 0", ["--batch-size must be at least 1, got 0"]),
        ("--batch-size -32", ["--batch-size must be at least 1, got -32"]),
        ("--batch-size 3.5", ["--batch-size must be a whole number, got '3.5'"]),
        ("--lr fast", ["--lr must be a number, got 'fast'"]),
        ("--lr 0", ["--lr must be more than 0, got 0"]),
        ("--lr nan", ["--lr must be a finite number, got nan"]),
        ("--timeout inf", ["--timeout must be a finite number, got inf"]),
        ("--timeout 1e10", ["--timeout must be at most 1000000000"]),
        ("--threads 100000", ["--threads must be at most 4096, got 100000"]),
        ("--dropout 1", ["--dropout must be less than 1, got 1"]),
        ("--seed 4294967296", ["--seed must be less than 4294967296"]),
        ("--bucket-mb 0", ["--bucket-mb must be more than 0"]),
        ("--output=", ["--output is empty"]),
        ("--seq-len 129", ["--seq-len 129", "128 positions", "gpt2-tiny"]),
        ("--steps 5 --epochs 1", ["--steps 5", "--epochs 1", "one of them"]),
        ("--batch-size 32 --grad-accumulation 5", ["32", "5 equal micro-batches", "30 or 35"]),
        ("--strategy ddp --algorithm ring", ["--algorithm ring", "--strategy ddp", "ps, dps, allreduce"]),
        ("--strategy ddp --overlap off", ["--overlap off", "--strategy ddp", "ps, dps, allreduce"]),
        ("--strategy single --wire fp16", ["--wire fp16", "--strategy single"]),
        ("--autocast on", ["--autocast on", "--precision"]),
        ("--autocast on --precision apex", ["--autocast on", "--precision"]),
        ("--apex-level O1 --precision fp16", ["--apex-level O1", "--precision fp16"]),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        flags(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@given(st.integers(1, 64), st.integers(1, 12), st.integers(1, 300))
def test_batch_is_dealt_equally_or_refused(size: int, pieces: int, batch_size: int) -> None:
    batch_size *= pieces
    config = Config(batch_size=batch_size, grad_accumulation=pieces)
    if batch_size % (size * pieces) == 0:
        config.validate_for(size)
        assert config.rank_batch_size(size) * size == batch_size
        return
    with pytest.raises(UsageError) as caught:
        config.validate_for(size)
    head, _, tail = str(caught.value).partition("nearest that can: ")
    assert f"--batch-size {batch_size} can't be dealt equally to {size} ranks" in head
    nearest = [int(number) for number in re.findall(r"\d+", tail)]
    for number in nearest:
        dataclasses.replace(config, batch_size=number).validate_for(size)
        assert 0 < abs(number - batch_size) < size * pieces
    assert len(nearest) == (2 if batch_size > size * pieces else 1)


def test_what_depends_on_the_number_of_ranks() -> None:
    flags("--strategy single").validate_for(1)
    with pytest.raises(UsageError, match=r"--strategy single trains on one rank, and this job has 4 ranks; .*mpirun"):
        flags("--strategy single").validate_for(4)
    flags("--nodes 0-3,4-7").validate_for(8)
    with pytest.raises(UsageError, match=r"--nodes '0-3,4-7' does not name each of the ranks 0..3"):
        flags("--nodes 0-3,4-7").validate_for(4)


@pytest.mark.parametrize(
    ("text", "wire"),
    [
        ("", None),
        ("--wire none", None),
        ("--wire bf16", "bf16"),
        ("--precision fp16", "fp16"),
        ("--precision bf16", "bf16"),
        ("--precision fp16 --wire none", None),
        ("--precision fp16 --wire bf16", "bf16"),
        ("--precision bf16 --wire none", None),
        ("--precision fp16 --strategy single", None),
        ("--precision apex", None),
    ],
)
def test_wire_follows_precision_unless_given(text: str, wire: str | None) -> None:
    assert flags(text).wire == wire


def test_learning_rate_rises_stays_and_falls() -> None:
    factors = [flags("--warmup-steps 3").lr_factor(step, 20) for step in range(21)]
    assert factors == [1 / 4, 2 / 4, 3 / 4, *[1.0] * 14, 3 / 4, 2 / 4, 1 / 4, 0.0]
    assert flags("").lr_factor(20, 200) == 1.0, "a tenth of the steps to warm up"
    assert flags("").lr_factor(19, 200) == 20 / 21
    assert flags("--warmup-steps 50").lr_factor(7, 10) == 8 / 51, "a run shorter than its warm-up only rises"
    assert flags("").lr_factor(0, 1) == 1.0, "even a run of one step learns"


def test_when_to_stop() -> None:
    assert flags("--steps 7").total_steps(100) == 7
    assert flags("--epochs 3").total_steps(100) == 300


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """B13: a rank gets its share of the cores that the node's ranks have together, and never more than its own. B23:
    OMP_NUM_THREADS is honoured."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert flags("--threads 5").thread_count(8) == (5, "--threads")
    cores = usable_cores()
    assert flags("").thread_count(1) == (cores, f"{cores} cores / 1 local ranks")
    assert flags("").thread_count(10 * cores)[0] == 1
    monkeypatch.setattr("commlab.trainer.config.usable_cores", lambda: 8)
    assert flags("").thread_count(8, 64) == (8, "64 cores / 8 local ranks"), "8 ranks, each bound to 8 cores"
    assert flags("").thread_count(4, 64) == (8, "8 cores of this rank's own")
    assert flags("").thread_count(8, 8) == (1, "8 cores / 8 local ranks"), "8 ranks that share 8 cores"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert flags("").thread_count(1, 64) == (1, "OMP_NUM_THREADS")
    assert flags("--threads 5").thread_count(1, 64) == (5, "--threads")


def test_help_shows_every_flag_with_its_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        flags("--help")
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')} " in shown
        default = f"{field.default:g}" if isinstance(field.default, float) else field.default
        assert default in (None, False) or f"(default: {default})" in shown, field.name
    assert "commlab" in shown


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_one_rank_speaks_for_all(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        Config.from_argv([flag], speak=False)
    assert left.value.code == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit):
        Config.from_argv([flag])
    assert "commlab" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--stratgy dps", "unknown flag '--stratgy'; did you mean --strategy?"),
        ("--wire fp8", "unknown wire 'fp8'; there are none, fp16, bf16"),
        ("--strategy ddp --algorithm ring", "--algorithm ring has no meaning for --strategy ddp"),
        ("--servers 2 --consistency asp --resume", "--resume can't be had under --consistency asp"),
    ],
)
def test_a_wrong_flag_is_reported_in_a_moment(text: str, words: str) -> None:
    """By the program itself, which has loaded nothing heavy by then; wrong alone, or together with others."""
    program = (
        "import sys, time\n"
        "from commlab.train import main\n"
        f"code = main({text.split()})\n"
        "heavy = {'torch', 'numpy', 'mpi4py', 'transformers'} & set(sys.modules)\n"
        "sys.exit(code if not heavy and time.process_time() < 1.0 else f'{heavy}, {time.process_time()} s')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"commlab: {words}"), done.stderr


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]
