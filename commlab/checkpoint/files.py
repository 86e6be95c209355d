"""Checkpoints as files: written aside, checked, and there only once they are whole.

    FOLDER/.step-0000000200.partial/     while it is written
    FOLDER/step-0000000200/              renamed when every byte of it is on disk
        rank-0-of-8.safetensors ...      what one rank knows
        manifest.json                    step, the ranks' files with their sizes and SHA-256, and the SHA-256 of itself

A process may die between any two instructions: before the rename there is no checkpoint, after the rename it is whole.
What the disk, or a hand, changes later is found when the checkpoint is read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError
from .nested import pack, unpack
from .writer import Writer

FORMAT = 1
MANIFEST = "manifest.json"
_TEXT_BYTES = 4096
_NAME = re.compile(r"step-(\d{10})(?:-(\d+))?")


class Refused(Exception):
    """A checkpoint that is truncated, altered, or not all there; the message says what is wrong with it."""


class StateFile(NamedTuple):
    """A file of a checkpoint, with the state of one rank. The manifest lists these files under ``parts``."""

    name: str
    """Its name in the checkpoint's folder."""
    size_bytes: int
    digest: str
    """The SHA-256 of its content."""


def aside(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of ``step`` while the checkpoint is written."""
    return folder / f".step-{step:010d}.partial"


def claim(folder: Path) -> Writer:
    """Make the folder, and take the right to write there: UsageError where another program has it. One rank."""
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return Writer(folder)


def begin(folder: Path, step: int, writer: Writer) -> None:
    """Make the folder aside, and remove what writers that died have left. One rank, which has the right to write."""
    with _reported(folder):
        own = aside(folder, step)
        for left in folder.glob(".step-*") if writer.locked else [own]:
            _delete(left)
        own.mkdir(parents=True)


def write_state(folder: Path, name: str, state: Any) -> StateFile:
    """Write ``state`` (:func:`commlab.checkpoint.nested.pack`) as a safetensors file ``name`` of the folder aside, and
    wait until the disk has all of it."""
    from safetensors.torch import save_file

    text, tensors = pack(state)
    # Numbers in the text have more digits or fewer: so a run's checkpoints are of one size all the same.
    text += " " * (-len(json.dumps(text)) % _TEXT_BYTES)
    path = folder / name
    with _reported(path):
        if not folder.is_dir():
            raise UsageError(f"{folder} was made by another rank and is not to be seen here; {_SHARED}")
        save_file(tensors, str(path), {"state": text})
        _to_disk(path)
        return StateFile(name, path.stat().st_size, _digest(path))


def commit(folder: Path, step: int, files: Sequence[StateFile], more: dict[str, Any]) -> Path:
    """Write the manifest and let the checkpoint appear; when this returns, the checkpoint is there for good. One rank,
    after all ``files`` are written. ``more``: plain JSON, for the manifest."""
    partial = aside(folder, step)
    content = {"format": FORMAT, "step": step, "parts": [list(file) for file in files], **more}
    with _reported(partial):
        for file in files:
            if not (partial / file.name).exists():
                raise UsageError(
                    f"{partial / file.name} was written by another rank and is not to be seen here; {_SHARED}"
                )
        (partial / MANIFEST).write_text(_rendered(content), encoding="utf-8")
        _to_disk(partial / MANIFEST)
        _to_disk(partial)
        # A checkpoint that was refused may have this name: it stays until a newer one is there.
        names = [f"step-{step:010d}", *(f"step-{step:010d}-{again}" for again in range(1, 1000))]
        final = next(path for path in (folder / name for name in names) if not path.exists())
        os.rename(partial, final)
        _to_disk(folder)
    return final


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints of the folder, whole or not."""
    with _reported(folder):
        try:
            found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        except FileNotFoundError:
            return []
    return [path for _, path in sorted(found, key=lambda item: (int(item[0][1]), int(item[0][2] or 0)), reverse=True)]


def remove(path: Path) -> None:
    """Remove a checkpoint; under another name, because half of a checkpoint must not look like a damaged one."""
    with _reported(path):
        hidden = path.with_name(f".{path.name}.removed")
        os.rename(path, hidden)
        _delete(hidden)


def _delete(path: Path) -> None:
    """Remove whatever is there: a folder with its content, a file, or a link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_manifest(path: Path) -> str:
    """The text of a checkpoint's manifest. Refused unless every byte of the text is as it was written."""
    with _refused_if_missing(path / MANIFEST):
        content = (path / MANIFEST).read_bytes()
    try:
        text = content.decode()
        manifest = json.loads(text)
        stated = manifest.pop("sha256")
        whole = isinstance(stated, str) and _rendered(manifest) == text
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{MANIFEST} is truncated or altered ({error!r})") from error
    if not whole:
        raise Refused(f"{MANIFEST} was altered: it does not have the SHA-256 that it states")
    if manifest["format"] != FORMAT:
        raise Refused(f"it has format {manifest['format']}, and this commlab reads format {FORMAT}")
    if _NAME.fullmatch(path.name) and int(path.name[5:15]) != manifest["step"]:
        raise Refused(f"its folder was renamed: it is of step {manifest['step']}")
    return text


def run_of(path: Path) -> str | None:
    """The run that a checkpoint is of; None where its manifest does not tell."""
    try:
        return json.loads(read_manifest(path)).get("run")  # type: ignore[no-any-return]
    except Refused:
        return None


def state_files(manifest: dict[str, Any]) -> list[StateFile]:
    """The ranks' files, as a manifest lists them."""
    return [StateFile(*entry) for entry in manifest["parts"]]


def verify(path: Path, file: StateFile) -> None:
    """Refused unless the file has exactly the bytes that were written."""
    with _refused_if_missing(path / file.name):
        size_bytes = (path / file.name).stat().st_size
        if size_bytes != file.size_bytes:
            raise Refused(f"{file.name} has {size_bytes} bytes, and was written with {file.size_bytes}")
        if _digest(path / file.name) != file.digest:
            raise Refused(f"{file.name} was altered: its content does not have the SHA-256 of the manifest")


def read_state(path: Path, file: StateFile) -> Any:
    """The state in a verified file; tensors lie in the mapped file, and are read when they are used."""
    from safetensors import safe_open

    with _reported(path / file.name), safe_open(str(path / file.name), "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return unpack(opened.metadata()["state"], tensors)


_SHARED = "all ranks must share the folder of checkpoints: put it on a file system that all hosts mount"


def _rendered(content: dict[str, Any]) -> str:
    """``content`` as JSON with its own checksum, in the one form that is accepted: a byte more or less is an
    alteration."""
    body = json.dumps(content, indent=1)
    return json.dumps({**content, "sha256": sha256(body.encode()).hexdigest()}, indent=1) + "\n"


def _digest(path: Path) -> str:
    found = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"checkpoint {path}: {error}; no checkpoint that was there before is touched. Make room or mend the disk, "
            "then --resume"
        ) from error


@contextmanager
def _refused_if_missing(path: Path) -> Iterator[None]:
    """A file that is gone is damage; one that cannot be read (rights, a broken disk) is for the user to decide."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused(f"{path.name} is missing") from error
    except OSError as error:
        raise UsageError(
            f"checkpoint {path} cannot be read: {error.strerror or error}; mend that, or move it away"
        ) from error
