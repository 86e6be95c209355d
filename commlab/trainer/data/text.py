"""Real text: where documents come from, and which text is held out. Reasons: docs/data.md."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from ...errors import UsageError

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

    def digest(self) -> bytes:
        """Equal exactly for equal documents, held out or not; 15 ms for 12 MB."""
        digest = blake2b(digest_size=16)
        for documents in (self.train, self.held_out):
            for document in documents:
                digest.update(len(document).to_bytes(8, "little"))
                digest.update(document)
            digest.update(b"end")
        return digest.digest()


def read_text(path: str | None = None) -> Text:
    """Read documents and hold out a twentieth.

    ``path``: a file, a folder (recursively, in the order of relative paths; files that are not UTF-8 text are skipped
    and counted), a .json file holding an array of texts, or None for the running Python's library sources without their
    tests (12 MB in Python 3.11). Of 40 documents or more every 20th is held out; of fewer, the last twentieth of each
    or, where each is too short for that, one document of 20 (of all, where there are fewer).
    Errors: UsageError for a missing or empty path, text that is not UTF-8, a .json of another form.
    """
    source = f"--data {path!r}" if path is not None else "the running Python's library sources"
    documents, skipped_files = _read_library() if path is None else _read(Path(path))
    text_bytes = sum(map(len, documents))
    if not text_bytes:
        raise UsageError(
            f"{source} holds no text ({skipped_files} files skipped that are not UTF-8); give a file or folder of text"
        )
    train, held_out = _split(documents)
    return Text(train, held_out, source, len(documents), text_bytes, skipped_files)


def _read(path: Path) -> tuple[list[bytes], int]:
    """(documents, number of files skipped) of a file or folder."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UsageError(f"--data {str(path)!r}: no such file or folder (looked in {os.getcwd()})")
    content = _read_bytes(path)
    if path.suffix == ".json":
        return _read_json(path, content), 0
    if not _is_text(content):
        raise UsageError(
            f"--data {str(path)!r} is not UTF-8 text; give text, a folder of text files, or a .json array of texts"
        )
    return [content], 0


def _read_json(path: Path, content: bytes) -> list[bytes]:
    """The documents of a file in the paper's format: a JSON array of strings, one document each."""
    wanted = 'a .json file must hold an array of texts, ["first text", "second text", ...]'
    try:
        texts = json.loads(content)
    except ValueError as error:
        raise UsageError(f"--data {str(path)!r} is not valid JSON ({error}); {wanted}") from error
    if not isinstance(texts, list):
        raise UsageError(f"--data {str(path)!r} holds a JSON {type(texts).__name__}; {wanted}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(
                f"--data {str(path)!r}: item {index} of the array is of type {type(text).__name__}; {wanted}"
            )
    # JSON can spell half of a surrogate pair, which no UTF-8 can hold.
    return [text.encode(errors="replace") for text in texts if text]


def _read_folder(root: Path, *, suffix: str = "", without: frozenset[str] = frozenset()) -> tuple[list[bytes], int]:
    """(documents, number of files skipped) of all files below ``root`` whose names end in ``suffix``; hidden,
    __pycache__ and ``without`` folders are not entered."""
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in without and name != "__pycache__" and not name.startswith(".")
        ]
        files += [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
    # os.walk follows the file system's order, which differs between machines; the order of relative paths does not.
    contents = [
        _read_bytes(file) for file in sorted(files, key=lambda file: file.relative_to(root).parts) if file.is_file()
    ]
    documents = [content for content in contents if _is_text(content)]
    return [content for content in documents if content], len(contents) - len(documents)


def _read_library() -> tuple[list[bytes], int]:
    """The sources of Python's own library. Its tests are left out: not every installation has them, and the text should
    not depend on the installation."""
    root = Path(sysconfig.get_path("stdlib"))
    return _read_folder(root, suffix=".py", without=_TEST_FOLDERS | {"site-packages", "dist-packages"})


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data {str(path)!r} cannot be read: {error.strerror or error}") from error


def _is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


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
