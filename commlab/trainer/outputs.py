"""Everything that a run will write: tried and claimed before the first step. The trained model is saved in any case:
where it can't be written to --output, it is written to the first folder that takes it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from ..checkpoint import files
from ..checkpoint.writer import NAME as LOCK
from ..checkpoint.writer import Writer
from ..errors import UsageError
from .config import Config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", *_TOKENIZER_FILES)
_TRIED_BYTES = 1 << 16
_STATE_FACTOR = 3
"""A checkpoint has each parameter and the two moments of Adam."""


class Outputs:
    """The right to write what ``config`` names, on the rank that writes; it lasts until :meth:`close`.

    Errors: UsageError, which names the flag, for a path that can't be written, and for one that another run writes to,
    with that run's host and process.
    """

    def __init__(self, config: Config):
        self._config = config
        self._writer: Writer | None = None
        if config.tensorboard is not None and find_spec("tensorboard") is None:
            raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out")
        _require_apart(config)
        try_folder("--output", config.output)
        # A folder that is both is locked by the checkpoints.
        if not (config.checkpoint_every and _same(config.output, config.checkpoint_folder)):
            with _reported("--output", config.output):
                self._writer = Writer(Path(config.output), f"--output {config.output!r}")
        if config.checkpoint_every:
            try_folder("--checkpoint-dir", config.checkpoint_folder)
        if config.tensorboard is not None:
            try_folder("--tensorboard", config.tensorboard)
        for flag, path in (("--metrics", config.metrics), ("--trace", config.trace)):
            if path is not None:
                try_file(flag, path)

    def require_room(self, model_bytes: int, total_steps: int) -> None:
        """UsageError where the disk has no room for the model, of ``model_bytes``, and for the checkpoints that a run
        of ``total_steps`` keeps. Cost: the room is reserved and given back; a file system that can't reserve is
        asked how much it has left."""
        config = self._config
        checkpoints = 0
        if config.checkpoint_every:
            saves = min(config.checkpoint_keep + 1, total_steps // config.checkpoint_every)
            saves -= len(files.newest_first(Path(config.checkpoint_folder)))
            checkpoints = max(0, saves) * _STATE_FACTOR * model_bytes
        with _reported("--output", config.output):
            apart = checkpoints and os.stat(config.output).st_dev != os.stat(config.checkpoint_folder).st_dev
        if apart:
            _reserve("--checkpoint-dir", config.checkpoint_folder, checkpoints, "the checkpoints")
            checkpoints = 0
        what = "the model and its checkpoints" if checkpoints else "the model"
        _reserve("--output", config.output, model_bytes + checkpoints, what)

    def close(self) -> None:
        """Let other runs write there."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _require_apart(config: Config) -> None:
    """UsageError where a file that this run writes is one that it reads, or belongs to something else it writes."""
    read = {"--data": config.data or (), "--model": config.model, "--tokenizer": config.tokenizer}
    folders = {"--output": config.output, "--model": config.model, "--tokenizer": config.tokenizer}
    for flag, path in (("--metrics", config.metrics), ("--trace", config.trace)):
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue  # of a device, a pipe and a folder nothing is lost
        for other, files_read in read.items():
            for file in (files_read,) if isinstance(files_read, str) else files_read:
                if os.path.isfile(file) and _same(path, file):
                    raise UsageError(f"{flag} {path!r} is the file of {other}, and would replace it; give another one")
        where, name = os.path.split(path)
        if name == LOCK and any(_same(where, folder) for folder in (config.output, config.checkpoint_folder)):
            raise UsageError(f"{flag} {path!r} is the file that locks its folder; give another name")
        for other, folder in folders.items():
            if name in _MODEL_FILES and _same(where, folder):
                raise UsageError(f"{flag} {path!r} is a file of the model in {other} {folder!r}; give another name")
        if flag == "--trace" and config.metrics is not None and _same(path, config.metrics):
            raise UsageError(f"--metrics and --trace are both {path!r}; give each a file of its own")
    for path in config.data or ():
        if os.path.isdir(path) and _same(path, config.output):
            raise UsageError(
                f"--output {config.output!r} is the folder of --data, and the next run would read the model as text;"
                " give another folder, in this one if you like"
            )


def try_folder(flag: str, folder: str) -> None:
    """Make the folder, where it is missing, and write a file there, which is removed again. UsageError where one of
    them fails."""
    path = Path(folder)
    with _reported(flag, folder):
        for above in (path, *path.parents):
            if above.is_symlink() and not above.exists():
                raise UsageError(
                    f"{flag} {folder!r}: {str(above)!r} is a link to {os.readlink(above)!r}, which does not exist; make"
                    " that folder, or give another one"
                )
            if above.exists() and not above.is_dir():
                raise UsageError(
                    f"{flag} {folder!r} is a file; give a folder, which is made where it does not exist"
                    if above == path
                    else f"{flag} {folder!r} lies below {str(above)!r}, which is a file; give another folder"
                )
        path.mkdir(parents=True, exist_ok=True)
        _take(folder, _TRIED_BYTES)


def try_file(flag: str, path: str) -> None:
    """Open the file for writing; its content stays, and a file that was not there is not there afterwards. UsageError
    where that fails."""
    found = Path(path)
    with _reported(flag, path):
        if found.is_dir() or not found.parent.is_dir():
            what = "is a folder" if found.is_dir() else f"lies in {str(found.parent)!r}, which is not a folder"
            raise UsageError(f"{flag} {path!r} {what}; give the name of a file in a folder that exists")
        if found.is_symlink() and not found.exists() and not (found.parent / os.readlink(found)).parent.is_dir():
            raise UsageError(
                f"{flag} {path!r} is a link into a folder that does not exist; make it, or give another file"
            )
        was_there = found.exists()
        if was_there and not found.is_file():
            return  # a device or a pipe: opening it may wait for a reader
        with open(path, "ab") as file:
            if not was_there:
                file.write(b"\n" * 4096)  # a full disk still makes empty files
        if not was_there:
            os.unlink(os.path.realpath(path))


def save_somewhere(folder: str, write: Callable[[str], None]) -> tuple[str, str]:
    """Let ``write(folder)`` write a model into ``folder`` or, where that fails, into the first of other folders that
    takes it. Returns the folder that has the model, "" where there is none, and what went wrong, "" where nothing did.

    The model is written aside first: a model that was in ``folder`` before is whole until the new one is.
    """
    try:
        _save_into(folder, write)
        return folder, ""
    except Exception as error:  # of transformers, safetensors, the disk: the model must not be lost for any of them
        trouble = f"--output {folder!r}: the model can't be saved there ({_cause(error)})"
    name = f"commlab-model-{socket.gethostname()}-{os.getpid()}"
    others = _other_folders()
    for parent in others:
        elsewhere = os.path.join(parent, name)
        try:
            _save_into(elsewhere, write)
        except Exception:
            shutil.rmtree(elsewhere, ignore_errors=True)
            continue
        return elsewhere, f"{trouble}; it was saved to {elsewhere}: move it from there"
    return "", f"{trouble}, nor in {', '.join(others)}: IT IS LOST; make room, and train again"


def _save_into(folder: str, write: Callable[[str], None]) -> None:
    final = Path(folder)
    final.mkdir(parents=True, exist_ok=True)
    aside = tempfile.mkdtemp(prefix=".model-", suffix=".partial", dir=final)
    try:
        write(aside)
        written = sorted(os.listdir(aside))
        for name in written:
            os.replace(os.path.join(aside, name), final / name)
        # Those of a model that was here before mean nothing to this one.
        for name in set(_TOKENIZER_FILES) - set(written):
            (final / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _reserve(flag: str, folder: str, size_bytes: int, what: str) -> None:
    try:
        _take(folder, size_bytes)
    except OSError as error:
        with _reported(flag, folder):
            left = shutil.disk_usage(folder).free
        raise UsageError(
            f"{flag} {folder!r} has no room for {what}: {size_bytes / 1e6:,.1f} MB are needed, and {left / 1e6:,.1f} MB"
            f" are left ({_cause(error)}); make room, or give another folder"
        ) from error


def _take(folder: str, size_bytes: int) -> None:
    """Have ``size_bytes`` of the disk for a moment."""
    descriptor, path = tempfile.mkstemp(prefix=".tried-", dir=folder)
    try:
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            if shutil.disk_usage(folder).free < size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    finally:
        os.close(descriptor)
        with suppress(OSError):
            os.unlink(path)


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _other_folders() -> list[str]:
    """The current folder, which may have been removed, those for temporary files, home, and at last memory."""
    found = []
    for folder in (os.getcwd, tempfile.gettempdir, "/var/tmp", os.path.expanduser("~"), "/dev/shm"):
        with suppress(OSError):
            found.append(folder if isinstance(folder, str) else folder())
    return [folder for folder in dict.fromkeys(found) if os.path.isdir(folder)]


def _cause(error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(str(reason).split()) or type(error).__name__


@contextmanager
def _reported(flag: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{flag} {path!r} can't be written: {_cause(error)}; give another one, or see to its rights and its disk"
        ) from error
