"""The launcher of the tests under mpirun: which files go together, and which exit code comes out."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MPI = ROOT / "tests/mpi"


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of ``tests/mpi/launch.py``, whose functions see what a test changes there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = runpy.run_path(str(MPI / "launch.py"))
    namespace: dict[str, Any] = module["main"].__globals__
    return namespace


def test_each_file_is_launched_once_and_who_leaves_something_comes_last(launcher: dict[str, Any]) -> None:
    ranks, files, others = launcher["chosen"](["4", "-k", "ring"])
    assert (ranks, others) == (4, ["-k", "ring"])
    assert sorted(files) == sorted(MPI.rglob("test_*.py"))
    last = [file for file in files if "\nLEAVES = " in file.read_text()]
    assert last and files[-len(last) :] == last == sorted(last)
    assert files[: -len(last)] == sorted(set(files) - set(last))


def test_a_file_and_a_folder_can_be_chosen(launcher: dict[str, Any]) -> None:
    folder, file = MPI / "window", MPI / "ps/test_store.py"
    ranks, files, others = launcher["chosen"]([str(folder), str(file), "--durations=5"])
    assert (ranks, others) == (launcher["RANKS"], ["--durations=5"])
    assert files == sorted([file, *folder.glob("test_*.py")])


def test_the_chosen_tenth(launcher: dict[str, Any]) -> None:
    """Every line of chosen.txt is a file with tests, of which the others start mpirun themselves."""
    chosen = runpy.run_path(str(ROOT / ".ci/mpis.py"))["chosen"]
    under, starting = chosen()
    assert sorted(launcher["chosen"](under)[1]) == sorted(ROOT / file for file in under)
    assert under and all("def test_" in (ROOT / file).read_text() for file in under)
    assert starting and all(" mpirun" in (ROOT / file).read_text() for file in starting)


def test_what_is_left_must_be_said(launcher: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "test_nothing.py"
    file.write_text("LEAVES = ''\n")
    with pytest.raises(SystemExit, match=r"test_nothing\.py:1: LEAVES must say what is left behind, as text"):
        launcher["leaves"](file)


@pytest.mark.parametrize("code", [0, 3, 5], ids=["all pass", "a failure", "no tests"])
def test_the_launch_s_exit_code_is_the_end(
    launcher: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], environment: dict[str, str]) -> int:
        assert int(environment["MPIEXEC_TIMEOUT"]) > 0
        commands.append(command)
        return code

    monkeypatch.setitem(launcher, "run", run)
    monkeypatch.setattr(sys, "argv", ["launch.py", "2", "-k", "ring"])
    assert launcher["main"]() == code
    [command] = commands
    assert command[1:3] == ["-n", "2"] and command[-2:] == ["-k", "ring"]
    assert (f"==== exit code {code}" in capsys.readouterr().err) == bool(code)
