"""Real text: where documents come from, and which text is held out. Reasons: docs/data.md."""

from __future__ import annotations

import dataclasses
import os
import stat
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from ...errors import UsageError
from .formats import TextField, is_dataset, not_text, read_dataset, read_file

HELD_OUT_EVERY = 20
"""One twentieth of the text is held out."""

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class Text:
    """Documents as UTF-8; no byte of them is both in ``train`` and in ``held_out``."""

    train: list[bytes]
    held_out: list[bytes]
    source: str
    documents: int
    text_bytes: int
    skipped_files: int
    """Files that are not UTF-8 text."""
    notes: tuple[str, ...] = ()
    """What else was left out."""

    def digest(self) -> bytes:
        """Equal exactly for equal documents, held out or not; 15 ms for 12 MB."""
        digest = blake2b(digest_size=16)
        for documents in (self.train, self.held_out):
            for document in documents:
                digest.update(len(document).to_bytes(8, "little"))
                digest.update(document)
            digest.update(b"end")
        return digest.digest()


def read_text(
    paths: str | Sequence[str] | None = None, text_field: str | None = None, written: Sequence[str] = ()
) -> Text:
    """Read documents and hold out a twentieth.

    ``paths``: what to read, in this order: files (plain text, a .json array of texts or of records, .jsonl; also with
    .gz, .bz2 or .xz), folders of such files (recursively, in the order of relative paths; links are followed, files
    that are not UTF-8 text are skipped and counted), folders that Hugging Face's datasets has saved. None: the running
    Python's library sources without their tests (12 MB in Python 3.11). ``text_field``: of records; None: it is found.
    ``written``: files and folders that the run writes, which are no text of a folder that they lie in.
    Of 40 documents or more every 20th is held out; of fewer, the last twentieth of each or, where each is too short for
    that, one document of 20 (of all, where there are fewer).
    Errors: UsageError for a missing or empty path, text that is not UTF-8, JSON of another form.
    """
    if paths is None:
        source, found = "the running Python's library sources", _read_library()
        field = TextField(None)
    else:
        paths = [paths] if isinstance(paths, str) else list(paths)
        source = f"--data {paths[0]!r}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        field, found, known = TextField(text_field), _Found([]), dict[str, str]()
        for path in paths:
            same = known.setdefault(os.path.realpath(path), path)
            if same is not path:
                raise UsageError(f"--data {path!r} and {same!r} are the same; give each text once")
            found.add(_read(Path(path), field, written))
    if text_field is not None and not field.used:
        raise UsageError(
            f"--text-field {text_field!r} is for JSON lines and datasets, and {source} has none; leave it out"
        )
    text_bytes = sum(map(len, found.documents))
    if not text_bytes:
        others = ", ".join([f"{found.skipped_files} files skipped that are not UTF-8", *found.notes])
        raise UsageError(f"{source} holds no text ({others}); give a file or folder of text")
    train, held_out = _split(found.documents)
    return Text(train, held_out, source, len(found.documents), text_bytes, found.skipped_files, tuple(found.notes))


@dataclass
class _Found:
    """What one path of --data holds."""

    documents: list[bytes]
    skipped_files: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: _Found) -> None:
        self.documents += other.documents
        self.skipped_files += other.skipped_files
        self.notes += other.notes


def _read(path: Path, field: TextField, written: Sequence[str]) -> _Found:
    try:
        return _read_found(path, path.stat(), field, written)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.lexists(path) and not os.path.exists(path):
            raise UsageError(
                f"--data {str(path)!r} is a link to {os.readlink(path)!r}, which does not exist"
            ) from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not os.path.lexists(path):
            raise UsageError(f"--data {str(path)!r}: no such file or folder (looked in {os.getcwd()})") from error
        at = "" if error.filename in (None, str(path)) else f"{str(error.filename)!r} "
        raise UsageError(f"--data {str(path)!r}: {at}cannot be read: {error.strerror or error}") from error


def _read_found(path: Path, found: os.stat_result, field: TextField, written: Sequence[str]) -> _Found:
    if stat.S_ISDIR(found.st_mode):
        if is_dataset(path):
            return _Found(read_dataset(path, field))
        return _read_folder(path, field, written=written)
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"--data {str(path)!r} is a pipe or a device, which can't be read by each rank; give a file")
    documents = read_file(path, field)
    if documents is None:
        raise not_text(path)
    return _Found(documents)


def _read_folder(
    root: Path,
    field: TextField,
    *,
    suffix: str = "",
    without: frozenset[str] = frozenset(),
    follow: bool = True,
    written: Sequence[str] = (),
) -> _Found:
    """The documents of all files below ``root`` whose names end in ``suffix``; hidden, __pycache__ and ``without``
    folders are not entered, nor folders behind links unless ``follow``. What is ``written`` is left out."""
    walk = _Walk(root, suffix, without | {"__pycache__"}, follow, written)
    found = _Found([], 0, walk.notes)
    # Each file system has an order of its own, which differs between machines; the order of relative paths does not.
    for file in sorted(walk.files, key=lambda file: file.relative_to(root).parts):
        documents = read_file(file, field, in_folder=True)
        found.documents += documents or []
        found.skipped_files += documents is None
    return found


class _Walk:
    """The files below ``root``, and what was left out. Where links are followed nothing is found twice, whatever leads
    to it: text that is held out would be trained on under its other name. What is there without a link comes first,
    then links by name."""

    def __init__(self, root: Path, suffix: str, without: frozenset[str], follow: bool, written: Sequence[str]):
        self.files: list[Path] = []
        self._suffix, self._without, self._follow = suffix, without, follow
        self._known: set[tuple[int, int]] = set()
        self._links: list[Path] = []
        self._nowhere = self._again = self._special = self._own = 0
        self._written = {_identity(path) for path in written if os.path.exists(path)}
        self._enter(root)
        while self._links:
            self._links.sort(reverse=True)
            link = self._links.pop()
            if not link.exists():
                self._nowhere += 1
            elif not link.is_dir():
                self._take(link)
            elif follow:
                self._enter(link)

    @property
    def notes(self) -> list[str]:
        counts = {
            "links that lead nowhere": self._nowhere,
            "links to what is read already": self._again,
            "pipes or devices": self._special,
            "files or folders of this run's own": self._own,
        }
        return [f"{count} {what} left out" for what, count in counts.items() if count]

    def _enter(self, root: Path) -> None:
        folders = [root]
        while folders:
            folder = folders.pop()
            if self._is_known(folder):
                continue
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                raise UsageError(f"--data: folder {str(folder)!r} cannot be read: {error.strerror or error}") from error
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path, is_folder = Path(folder, entry.name), entry.is_dir()
                if entry.name in self._without if is_folder else not entry.name.endswith(self._suffix):
                    continue
                if entry.is_symlink():
                    self._links.append(path)
                elif is_folder:
                    folders.append(path)
                else:
                    self._take(path)

    def _take(self, path: Path) -> None:
        if not stat.S_ISREG(path.stat().st_mode):
            self._special += 1
        elif not (self._follow and self._is_known(path)):
            self.files.append(path)

    def _is_known(self, path: Path) -> bool:
        """Whether the file or folder was seen before; from now on it was."""
        identity = _identity(path)
        if identity in self._written:
            self._own += 1
            return True
        if identity in self._known:
            self._again += 1
            return True
        self._known.add(identity)
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    """What a file has in common with its other names, and with nothing else."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _read_library() -> _Found:
    """The sources of Python's own library. Its tests are left out: not every installation has them, and the text should
    not depend on the installation."""
    root = Path(sysconfig.get_path("stdlib"))
    without = _TEST_FOLDERS | {"site-packages", "dist-packages"}
    return dataclasses.replace(
        _read_folder(root, TextField(None), suffix=".py", without=without, follow=False), notes=[]
    )


def _split(documents: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """(texts to train on, texts held out); together they are the documents, byte for byte."""
    if len(documents) >= 2 * HELD_OUT_EVERY:
        held_out = [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        return [text for index, text in enumerate(documents) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out
    cuts = [(text, _cut(text)) for text in documents]
    if any(cut < len(text) for text, cut in cuts) or len(documents) < 2:
        return [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
    # Texts so short that a twentieth of each is nothing.
    every = min(len(documents), HELD_OUT_EVERY)
    held_out = list(documents[every - 1 :: every])
    return [text for index, text in enumerate(documents) if index % every != every - 1], held_out


def _cut(text: bytes) -> int:
    """Where the last twentieth of ``text`` starts: at a line's start if one is near, else at a character's."""
    wanted = len(text) - len(text) // HELD_OUT_EVERY
    line = text.rfind(b"\n", len(text) * 9 // 10, wanted) + 1
    if line:
        return line
    while 0 < wanted < len(text) and text[wanted] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        wanted -= 1
    return wanted
