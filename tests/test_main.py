"""``python -m commlab``: a report that never fails, whatever is missing, and the programs by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commlab.__main__ import main, report

ROOT = Path(__file__).parents[1]
ROWS = ("commlab", "python", "system", "packages", "arithmetic", "window", "links", "GPU", "cores", "memory", "limits")
ROWS += ("launched by", "variables", "MPI", "torch")


def test_the_report_has_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the programs that are asked: these are tried below."""
    monkeypatch.setattr("commlab.__main__._ASK_MPI", "print('an MPI')")
    monkeypatch.setattr("commlab.__main__._ASK_TORCH", "print('True 3')")
    monkeypatch.setattr("commlab.__main__.LIMIT_S", 60.0)
    lines = list(report())
    assert [line[:12].strip() for line in lines[: len(ROWS)]] == list(ROWS)
    text = "\n".join(lines)
    assert "can't be found out" not in text
    assert "an MPI; " in text and "imports, and sees 3 GPUs" in text
    assert "commlab bench" in text


def test_what_is_broken_costs_one_row(tmp_path: Path) -> None:
    """Without MPI, with half of torch, without a native module, to a reader of ASCII: an answer, and no traceback."""
    for name, program in (
        ("mpi4py", "raise RuntimeError('cannot load MPI library')"),
        ("torch", "import time; time.sleep(60)"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(program)
    program = (
        "import sys, commlab.__main__ as program; program.LIMIT_S = 1.0\n"
        "sys.modules['commlab._native'] = None\n"
        "program._cores = lambda: 1 / 0\n"
        "sys.exit(program.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "LC_ALL": "C", "OMP_NUM_THREADS": "dr\u00e4i"},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )
    shown = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert "MPI          CAN'T BE USED: RuntimeError: cannot load MPI library; " in shown
    assert "no answer within 1 s" in shown
    assert "arithmetic   torch: the native module" in shown
    assert "cores        can't be found out: ZeroDivisionError" in shown


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["--steps", "3"], "flags of the trainer come after train: commlab train --steps ..."),
        (["bench", "allredcue"], "unknown benchmark 'allredcue'; there are accuracy, allreduce, "),
        (["train", "--stpes", "3"], "unknown flag '--stpes'; did you mean --steps?"),
    ):
        assert main(argv) == 2
        assert words in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert "commlab report" in capsys.readouterr().out


def test_one_rank_reports(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    assert main(["info"]) == 0
    assert capsys.readouterr().out == ""
