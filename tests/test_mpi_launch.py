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


def test_each_file_is_launched_once_and_lonely_ones_alone(launcher: dict[str, Any]) -> None:
    ranks, files, others = launcher["chosen"](["4", "-k", "ring"])
    assert (ranks, others) == (4, ["-k", "ring"])
    assert files == sorted(MPI.rglob("test_*.py"))
    together, *lonely = launcher["launches"](files)
    assert sorted([*together, *(file for [file] in lonely)]) == files
    assert [file for [file] in lonely] == [file for file in files if "\nALONE = " in file.read_text()]
    assert all(launcher["reason_alone"](file) for [file] in lonely) and len(together) > len(lonely) > 0


def test_a_file_and_a_folder_can_be_chosen(launcher: dict[str, Any]) -> None:
    folder, file = MPI / "window", MPI / "ps/test_store.py"
    ranks, files, others = launcher["chosen"]([str(folder), str(file), "--durations=5"])
    assert (ranks, others) == (launcher["RANKS"], ["--durations=5"])
    assert files == sorted([file, *folder.glob("test_*.py")])


def test_the_chosen_tenth(launcher: dict[str, Any]) -> None:
    """Every line of chosen.txt is a file with tests, of which the others start mpirun themselves."""
    chosen = runpy.run_path(str(ROOT / ".ci/mpis.py"))["chosen"]
    under, starting = chosen()
    assert launcher["chosen"](under)[1] == sorted(ROOT / file for file in under)
    assert under and all("def test_" in (ROOT / file).read_text() for file in under)
    assert starting and all(" mpirun" in (ROOT / file).read_text() for file in starting)


def test_a_reason_must_be_given(launcher: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "test_nothing.py"
    file.write_text("ALONE = ''\n")
    with pytest.raises(SystemExit, match=r"test_nothing\.py:1: ALONE must be the reason, as text"):
        launcher["reason_alone"](file)


@pytest.mark.parametrize(
    "arguments, codes, code, launched",
    [
        ([], [0, 0, 0], 0, 3),
        ([], [0, 3], 3, 2),
        ([], [5], 5, 1),
        (["-k", "ring"], [5, 0, 5], 0, 3),
        (["-k", "ring"], [5, 5, 5], 5, 3),
    ],
    ids=["all pass", "the first failure ends it", "an empty launch", "some selected", "none selected"],
)
def test_the_first_failing_exit_code_is_the_end(
    launcher: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    codes: list[int],
    code: int,
    launched: int,
) -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], environment: dict[str, str]) -> int:
        assert int(environment["MPIEXEC_TIMEOUT"]) > 0
        commands.append(command)
        return codes[len(commands) - 1]

    monkeypatch.setitem(launcher, "run", run)
    monkeypatch.setattr(sys, "argv", ["launch.py", "2", *arguments])
    assert launcher["main"]() == code
    assert len(commands) == launched and all(command[1:3] == ["-n", "2"] for command in commands)
    named = capsys.readouterr().err
    assert (f"==== exit code {code}: tests/mpi/" in named) == (launched < 3)
