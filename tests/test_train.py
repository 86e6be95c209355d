"""The trainer in one process: what it leaves behind, and how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import commlab
from commlab.train import main
from commlab.trainer.report import Report

MODEL = {"model_type": "gpt2", "vocab_size": 256, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
STEPS = 6


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a text of 6 kB, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("model.json").write_text(json.dumps(MODEL))
    Path("text.txt").write_text("".join(f"line {number} of the text, and {number**2}\n" for number in range(150)))


def run(*more: str) -> int:
    flags = "--strategy single --model model.json --data text.txt --batch-size 8 --dropout 0.1 --eval-every 0"
    flags += " --sample 0"
    return main([*flags.split(), "--steps", str(STEPS), "--metrics", "m.jsonl", *more])


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def rows(path: str = "m.jsonl") -> list[dict[str, Any]]:
    """The steps' lines of the metrics file, without what is measured."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return [{key: line[key] for key in ("step", "lr", "loss", "grad_norm")} for line in lines if "loss" in line]


def test_a_resumed_run_ends_with_the_same_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", "whole") == 0
    whole = rows()
    assert run("--output", "parts", "--checkpoint-every", "2", "--checkpoint-keep", "3") == 0
    assert weights("parts") == weights("whole"), "saving changes nothing"
    # As if it had ended after the fourth step.
    lines = Path("m.jsonl").read_text().splitlines(keepends=True)
    written = next(at for at, line in enumerate(lines) if '"checkpoint_s"' in line and '"step": 4' in line)
    Path("m.jsonl").write_text("".join(lines[: written + 1]))
    Path("parts/checkpoints/step-0000000006").rename("last")
    Path("parts/model.safetensors").unlink()
    capsys.readouterr()
    assert run("--output", "parts", "--checkpoint-every", "2", "--resume") == 0
    assert "resume: from step 4 in parts/checkpoints" in capsys.readouterr().out
    assert rows() == whole, "losses, gradient norms and learning rates too; the file goes on"
    assert weights("parts") == weights("whole")
    assert Path("parts/checkpoints/step-0000000006/manifest.json").exists()
    assert run("--output", "parts", "--checkpoint-every", "2", "--resume") == 0
    assert "nats per token" not in capsys.readouterr().out, "no step was left to do, so there is no loss"
    json.loads(Path("m.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)


def test_ctrl_c_while_torch_is_imported() -> None:
    """No traceback of every rank: the hook is there before the imports that take seconds."""
    program = """
import sys
import commlab.train
def interrupted(*_):
    assert "torch" not in sys.modules
    raise KeyboardInterrupt
commlab.train.train = interrupted
commlab.train.main([])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(commlab.__file__).parents[1]), "PMI_RANK": "0", "PMI_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_what_is_damaged_is_said_and_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", "whole", "--checkpoint-every", "2") == 0
    part = Path("whole/checkpoints/step-0000000006/rank-0-of-1.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    before = weights("whole")
    assert run("--output", "whole", "--checkpoint-every", "2", "--resume") == 0
    said = capsys.readouterr().out
    assert "checkpoint REFUSED: step-0000000006: rank-0-of-1.safetensors has" in said
    assert "resume: from step 4" in said
    assert weights("whole") == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--checkpoint-every 2", "there are checkpoints already, the newest o/checkpoints/step-0000000006; --resume"),
        ("--resume --steps 5", "the checkpoint is of step 6, and this run ends after 5; give more steps"),
        ("--resume --seed 3", "was made with seed 0, and this run has 3"),
        ("--resume --lr 0.5", "was made with lr 0.00015, and this run has 0.5"),
        ("--resume", "was made with text "),
    ],
)
def test_another_run_is_refused(more: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", "o", "--checkpoint-every", "6") == 0
    if more == "--resume":
        Path("text.txt").write_text(Path("text.txt").read_text().replace("7", "8"))
    assert run("--output", "o", *more.split()) == 2
    assert words in capsys.readouterr().err


def test_a_tokenizer_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned once, saved beside the model, the same after a resume."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    Path("model.json").write_text(json.dumps({**MODEL, "vocab_size": 310}))
    flags = ["--tokenizer", "bpe:300", "--checkpoint-every", "3"]
    assert run("--output", "whole", *flags) == 0
    said = capsys.readouterr().out
    assert "tokenizer: learning bpe:300 from the training text" in said
    assert "vocabulary of 300" in said
    before = weights("whole")
    Path("whole/checkpoints/step-0000000006").rename("last")
    assert run("--output", "whole", *flags, "--resume") == 0
    assert weights("whole") == before
    said = capsys.readouterr().out
    assert "learning" not in said
    assert "resume: from step 3" in said

    from tokenizers import Tokenizer

    saved = Tokenizer.from_file("whole/tokenizer.json")
    assert saved.get_vocab_size() == 300
    assert saved.decode(saved.encode("line 7, naïve").ids) == "line 7, naïve"
    assert run("--output", "whole", *flags, "--resume", "--tokenizer", "bpe:301") == 2
    assert "was made with text " in capsys.readouterr().err


def test_no_checkpoint_means_the_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", "new", "--resume") == 0
    assert "resume: at the beginning: there is no checkpoint in new/checkpoints" in capsys.readouterr().out


def test_tensorboard_shows_what_the_metrics_say() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("--output", "new", "--tensorboard", "board", "--eval-every", "3") == 0
    shown = EventAccumulator("board").Reload()
    losses = [(event.step, event.value) for event in shown.Scalars("loss/train, nats per token")]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in losses] == pytest.approx([row["loss"] for row in rows()])
    assert [event.step for event in shown.Scalars("loss/held-out, bits per byte")] == [3, 6]
    assert "step/exchange, s" in shown.Tags()["scalars"]


@pytest.mark.parametrize("more", ["", "--max-grad-norm 0", "--strategy dps", "--strategy allreduce --precision bf16"])
def test_a_run_that_diverges_ends_with_an_error(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A14: ``--lr 1e15``: an exit code that is not 0, a sentence, and no model that looks like one."""
    assert run("--lr", "1e15", "--warmup-steps", "0", "--output", "nothing", *more.split()) == 2
    told = capsys.readouterr().err
    assert "commlab: " in told and ("is not finite" in told or "is nan" in told or "is inf" in told)
    assert "Traceback" not in told and not Path("nothing", "model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["ps", "dps", "allreduce", "ddp"])
def test_every_strategy_gets_through_the_trainer(strategy: str) -> None:
    """One rank of each: what the trainer and its report ask of an engine, all of them have."""
    assert run("--output", "single") == 0
    assert run("--output", strategy, "--strategy", strategy, "--metrics", "other.jsonl") == 0
    losses = [row["loss"] for row in rows("other.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in rows()], rel=1e-4)


def test_a_model_that_cannot_be_saved_is_saved_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Outputs: the folder is gone, and a file is there, when the run ends; and metrics that nobody takes."""
    from commlab.trainer.report import Report

    closing = Report.evaluated

    def spoil(self: Report, step: int, bits: float) -> None:
        closing(self, step, bits)
        shutil.rmtree("o")
        Path("o").write_text("")

    monkeypatch.setattr(Report, "evaluated", spoil)
    assert run("--output", "o") == 2
    shown = capsys.readouterr()
    folder = next(tmp_path.glob("commlab-model-*"))
    assert f"commlab: --output 'o': the model can't be saved there (File exists); it was saved to {folder}" in shown.err
    assert weights(str(folder)) and f"{folder} (transformers" in shown.out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("--output", "p", "--metrics", "/dev/full") == 2
    shown = capsys.readouterr()
    assert "commlab: the metrics are not whole: from step none on they can't be written" in shown.err
    assert weights("p") == weights(str(folder))


def test_a_second_run_into_the_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs: before the first step, and nothing of the first is touched."""
    from commlab.trainer.config import Config
    from commlab.trainer.outputs import Outputs

    first = Outputs(Config(output="o"))
    assert run("--output", "o") == 2
    assert f"--output 'o': another run of this process (pid {os.getpid()} on " in capsys.readouterr().err
    first.close()


def test_an_evaluation_without_a_byte_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Short data: said before the first step, and not by a division by zero after the last."""
    Path("text.txt").write_text("a" * 100 + "\n")
    short = ["--batch-size", "1", "--seq-len", "4"]
    assert run("--output", "o", *short) == 0
    Path("text.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    assert run("--output", "o", *short) == 2
    assert "is too short: 26 bytes make 26 tokens to train on and 2 held out" in capsys.readouterr().err


def test_a_warned_run_saves_and_goes_on_later(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """SIGUSR1, by which schedulers say that the time is nearly up. The exit code asks to be started
    again."""
    assert run("--output", "whole") == 0
    whole = rows()
    Path("m.jsonl").unlink()

    def phase(self: Report, name: str, _phase: Any = Report.phase) -> Any:
        if name == "backward" and self._steps_done == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return _phase(self, name)

    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        patch.setattr(Report, "phase", phase)
        assert run("--output", "parts", "--checkpoint-every", "100") == 75
    assert signal.getsignal(signal.SIGUSR1) == before
    assert "SIGUSR1: the run ends after step 4, which is saved; --resume goes on" in capsys.readouterr().out
    assert not Path("parts/model.safetensors").exists()
    assert run("--output", "parts", "--checkpoint-every", "100", "--resume") == 0
    assert "resume: from step 4 in parts/checkpoints" in capsys.readouterr().out
    assert rows() == whole
    assert weights("parts") == weights("whole")
