"""--config and --print-config: the same names as the flags, which win; each mistake one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commlab.errors import UsageError
from commlab.trainer.config import Config


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_file(content: str, flags: str = "") -> Config:
    Path("run.toml").write_text(content)
    return Config.from_argv(["--config", "run.toml", *flags.split()])


def test_flags_win() -> None:
    config = with_file('batch-size = 8\nlr = 1\ndata = ["a", "b"]\noverlap = false\nresume = true\nbuffers = "mean"')
    assert (config.batch_size, config.lr, config.data) == (8, 1.0, ("a", "b"))
    assert (config.overlap, config.resume, config.buffers) == ("off", True, "mean")
    assert with_file("batch_size = 8", "--batch-size 4").batch_size == 4
    assert with_file("steps = 8", "--epochs 4").steps is None, "both say when to stop, and the flag wins"
    assert with_file('data = "a"', "--data b c").data == ("b", "c")
    assert Config.from_argv(["--data", "a", "--data", "b", "c"]).data == ("a", "b", "c")
    assert with_file("") == Config()
    assert with_file("\ufeffsteps = 8\r\n").steps == 8, "as editors of other systems write"


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--strategy ps --servers 1 --consistency asp --data a b --epochs 2",
        "--strategy single --precision fp16 --tokenizer bpe --resume --timeout 1e-5",
        "--strategy allreduce --wire none --precision bf16 --dropout 0.1 --compile",
        '--data a"b\\n\x7f\n🚂 --text-field é',
    ],
)
def test_what_is_printed_is_read(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags.split(" ") if flags else []
    with pytest.raises(SystemExit) as left:
        Config.from_argv([*argv, "--print-config"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert with_file(shown) == Config.from_argv(argv)
    assert all(f"{field.replace('_', '-')}" in shown for field in Config.__dataclass_fields__)
    with pytest.raises(SystemExit):
        Config.from_argv([*argv, "--print-config"], speak=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("bathc-size = 8", "unknown key 'bathc-size'; did you mean batch-size?"),
        ("wholly_other = 8", "unknown key 'wholly_other'; --print-config shows all"),
        ('config = "other.toml"', "unknown key 'config'"),
        ('steps = "100"', 'steps must be a whole number, got "100"'),
        ("steps = 1.5", "steps must be a whole number, got 1.5"),
        ("steps = true", "steps must be a whole number, got true"),
        ("lr = 'fast'", 'lr must be a number, got "fast"'),
        ("resume = 1", "resume must be true or false, got 1"),
        ("output = 3", "output must be a text, got 3"),
        ("data = [1]", "data must be a text, or an array of texts, got [1]"),
        ("[train]\nsteps = 3", "train"),
        ("steps = 2020-01-01", "steps must be a whole number, got 2020-01-01"),
        ("[steps]\na = 3", "steps is a table; a line gives one flag"),
        ("batch-size = 8\nbatch_size = 8", "is there twice"),
        ("steps = ", "is not TOML ("),
        ("steps = " + "[" * 100_000, "is nested too deeply"),
        ("lr = 1" + "0" * 400, "lr must be a finite number, got one of 401 digits"),
        ('output = "a\\u0000b"', "--output 'a\\x00b' has a NUL character"),
        ('data = ["a\\u0000b"]', "has a NUL character"),
        ('metrics = "run.toml"', "--metrics 'run.toml' is the file of --config, and would replace it"),
        ("batch-size = 0", "--batch-size must be at least 1, got 0 (flags, and --config 'run.toml')"),
    ],
)
def test_mistakes(content: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        with_file(content)


def test_files_that_cannot_be_read() -> None:
    Path("latin.toml").write_bytes("output = 'é'".encode("latin-1"))
    for name, words in (("gone.toml", "No such file"), (".", "Is a directory"), ("latin.toml", "is not TOML")):
        with pytest.raises(UsageError, match=words):
            Config.from_argv(["--config", name])
