"""What a run writes: tried and claimed before its first step, and a model that is saved in any case."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import commlab
from commlab.errors import UsageError
from commlab.trainer.config import Config
from commlab.trainer.outputs import Outputs, save_somewhere

LONG = "a" * 300
"""No name of a file may be as long."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    Path("file").touch()
    Path("nowhere").symlink_to("gone")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output": "file"}, "--output 'file' is a file; give a folder"),
        ({"output": "file/a/b"}, "--output 'file/a/b' lies below 'file', which is a file"),
        ({"output": "nowhere"}, "'nowhere' is a link to 'gone', which does not exist"),
        ({"output": "nowhere/a"}, "'nowhere' is a link to 'gone', which does not exist"),
        ({"output": "/proc/commlab"}, "--output '/proc/commlab' can't be written: "),
        ({"tensorboard": "file"}, "--tensorboard 'file' is a file"),
        ({"checkpoint_dir": "file", "checkpoint_every": 1}, "--checkpoint-dir 'file' is a file"),
        ({"metrics": "tmp"}, "--metrics 'tmp' is a folder"),
        ({"trace": "gone/t.json"}, "--trace 'gone/t.json' lies in 'gone', which is not a folder"),
        ({"trace": "/proc/commlab"}, "--trace '/proc/commlab' can't be written: "),
        ({"metrics": "o/../t", "trace": "t"}, "--metrics and --trace are both 't'"),
        ({"output": LONG}, "can't be written: File name too long"),
        ({"metrics": LONG}, "can't be written: File name too long"),
        ({"trace": LONG}, "can't be written: File name too long"),
        ({"checkpoint_dir": LONG, "checkpoint_every": 1}, "can't be written: File name too long"),
        ({"metrics": "file", "data": "tmp/../file"}, "--metrics 'file' is the file of --data, and would replace it"),
        ({"trace": "file", "tokenizer": "file"}, "--trace 'file' is the file of --tokenizer"),
        ({"trace": "o/model.safetensors"}, "--trace 'o/model.safetensors' is a file of the model in --output 'o'"),
        ({"metrics": "tmp/config.json", "tokenizer": "tmp"}, "is a file of the model in --tokenizer 'tmp'"),
        ({"metrics": "o/.writer"}, "--metrics 'o/.writer' is the file that locks its folder"),
        ({"metrics": "tmp/.writer", "checkpoint_dir": "tmp"}, "is the file that locks its folder"),
        ({"output": "tmp", "data": ("file", "tmp")}, "--output 'tmp' is the folder of --data"),
    ],
)
def test_what_cannot_be_written_is_known_at_once(arguments: dict[str, object], words: str) -> None:
    """Outputs: below a file, a broken link, a file system that takes nothing."""
    if "tensorboard" in arguments:
        pytest.importorskip("tensorboard")
    with pytest.raises(UsageError) as caught:
        Outputs(Config(**{"output": "o", **arguments}))  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_devices_lose_nothing() -> None:
    Outputs(Config(output="o", metrics="/dev/null", trace="/dev/null"))


RIGHTS_PROGRAM = """
import os
from commlab.checkpoint.files import newest_first
from commlab.errors import UsageError
from commlab.trainer.config import Config
from commlab.trainer.data.text import read_text
from commlab.trainer.data.tokenizer import open_tokenizer
from commlab.trainer.model import describe_model
from commlab.trainer.outputs import Outputs
from pathlib import Path

if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def refused(call):
    try:
        call()
    except UsageError as error:
        assert "Permission denied" in str(error), error
        return
    raise AssertionError("not refused")
for path in ("dark/f", "dark"):
    refused(lambda: read_text(path))
    refused(lambda: open_tokenizer(path))
    refused(lambda: describe_model(path))
    refused(lambda: newest_first(Path(path)))
for arguments in ({"output": "dark/x/y"}, {"metrics": "dark/m"}, {"trace": "dark/t"},
                  {"checkpoint_dir": "dark/c", "checkpoint_every": 1}):
    refused(lambda: Outputs(Config(**{"output": "o", **arguments})))
print("all refused")
"""


def test_folders_that_may_not_be_entered(tmp_path: Path) -> None:
    """A user without rights gets one sentence, in which nothing is said not to exist that may well be there."""
    (tmp_path / "dark").mkdir()
    (tmp_path / "dark/f").touch()
    (tmp_path / "dark").chmod(0)
    tmp_path.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", RIGHTS_PROGRAM],
        env={**os.environ, "PYTHONPATH": str(Path(commlab.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    (tmp_path / "dark").chmod(0o700)
    assert done.stdout == "all refused\n", done.stderr


def test_trying_leaves_nothing() -> None:
    Path("m.jsonl").write_text("what was there\n")
    outputs = Outputs(Config(output="new/folder", metrics="m.jsonl", trace="t.json", checkpoint_every=5))
    outputs.require_room(100, 10)
    assert sorted(os.listdir("new/folder")) == [".writer", "checkpoints"]
    assert os.listdir("new/folder/checkpoints") == []
    assert Path("m.jsonl").read_text() == "what was there\n"
    assert not Path("t.json").exists()


def test_two_runs_into_one_folder() -> None:
    """Two runs: the second knows the first by host and process; a link to the folder is the same folder."""
    first = Outputs(Config(output="o"))
    Path("link").symlink_to("o")
    for name in ("o", "link"):
        with pytest.raises(UsageError, match=rf"--output '{name}': .*pid {os.getpid()} on {socket.gethostname()}"):
            Outputs(Config(output=name))
    Outputs(Config(output="other")).close()
    first.close()
    Outputs(Config(output="o")).close()


def test_checkpoints_in_the_folder_of_the_model() -> None:
    Outputs(Config(output="o", checkpoint_dir="o", checkpoint_every=1)).close()


def test_no_room() -> None:
    """A disk without room: by a limit on files, which is found in the same way."""
    outputs = Outputs(Config(output="o", checkpoint_every=10))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        outputs.require_room(1 << 20, 9)
        with pytest.raises(UsageError, match=r"--output 'o' has no room for the model: 1.0 MB are needed, and .* left"):
            outputs.require_room((1 << 20) + 1, 9)
        with pytest.raises(UsageError, match=r"for the model and its checkpoints: 3.7 MB are needed"):
            outputs.require_room(1 << 19, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def writer_that_fails(*folders: str) -> Callable[[str], None]:
    def write(into: str) -> None:
        Path(into, "config.json").write_text("new")
        if Path(into).parent.name in folders or Path(into).name in folders:
            raise OSError(28, "No space left on device")
        Path(into, "model.safetensors").write_text("new")

    return write


def test_a_model_appears_whole() -> None:
    Path("o").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "notes.txt"):
        Path("o", name).write_text("old")
    assert save_somewhere("o", writer_that_fails()) == ("o", "")
    assert {path.name: path.read_text() for path in Path("o").iterdir()} == {
        "config.json": "new",
        "model.safetensors": "new",
        "notes.txt": "old",
    }, "the tokenizer was that of the model before"


def test_a_model_is_saved_somewhere(tmp_path: Path) -> None:
    """Outputs: the disk is full at the end, or the folder has become a file."""
    Path("o").mkdir()
    Path("o/model.safetensors").write_text("old")
    folder, trouble = save_somewhere("o", writer_that_fails("o"))
    assert Path(folder).parent == tmp_path
    assert Path(folder, "model.safetensors").read_text() == "new"
    assert trouble == (
        f"--output 'o': the model can't be saved there (No space left on device); it was saved to {folder}: move it "
        "from there"
    )
    assert os.listdir("o") == ["model.safetensors"]
    assert Path("o/model.safetensors").read_text() == "old", "whole until there is another"
    assert Path(save_somewhere("file", writer_that_fails())[0], "config.json").exists()
    folder, trouble = save_somewhere("o", writer_that_fails("o", Path(folder).name))
    assert folder == ""
    assert trouble.endswith("IT IS LOST; make room, and train again")
    assert sorted(os.listdir()) == ["file", "nowhere", "o", "tmp"]
