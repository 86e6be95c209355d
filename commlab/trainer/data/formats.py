"""What a file of --data may be: plain text, a JSON array, JSON lines, each also compressed; and a saved dataset."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UsageError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
_WAYS_OUT = {
    ".parquet": "read it with the package datasets, and give the folder of its save_to_disk()",
    ".arrow": "give the folder that save_to_disk() of the package datasets has made",
    ".zip": "unpack it",
    ".zst": "decompress it (zstd -d)",
    ".7z": "unpack it",
}
_FIRST_BYTES, _BLOCK_BYTES = 1 << 16, 1 << 20
_USUAL_FIELDS = ("text", "content")
_ARRAY = 'a .json file must hold an array of texts, ["first text", "second text", ...], or of objects with a text field'
_LINES = 'each line must be a JSON text, or an object with a text field, {"text": "first text"}'


class TextField:
    """The field of records that has the text: ``name``, where the user has given one, else found in each file's first
    record."""

    def __init__(self, name: str | None):
        self.name = name
        self.used = False
        """Whether there were records at all."""

    def choose(self, names: Iterable[str], where: str) -> str:
        """The field, of a record that has texts in the fields ``names``. UsageError where it can't be known."""
        self.used = True
        found = list(names)
        if self.name is not None:
            return self.name
        usual = [name for name in _USUAL_FIELDS if name in found]
        if usual or len(found) == 1:
            return (usual or found)[0]
        there = (
            f"texts are in {', '.join(map(repr, found))}; say which with --text-field" if found else "no field is one"
        )
        raise UsageError(f"{where} has no field 'text', and {there}")


def read_file(path: Path, field: TextField, in_folder: bool = False) -> list[bytes] | None:
    """The documents of a file; None where it is not UTF-8 text, of which no more is read than needed. ``in_folder``:
    a .json file is a document by itself, unless it is an array of texts. UsageError for a file that can't be read,
    and for JSON of another form."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSED else ""
    kind = suffixes[-1] if suffixes else ""
    content = _compressed(path, _COMPRESSED[compressed]) if compressed else _plain(path)
    if content is None:
        return None
    if kind in JSON_LINES:
        return _of_lines(path, content, field)
    if kind == ".json":
        return _array_or_text(content) if in_folder else _of_array(path, content, field)
    return [content] if content else []


def not_text(path: Path) -> UsageError:
    """The error for a file that is not UTF-8 text."""
    way_out = _WAYS_OUT.get(path.suffix.lower(), "give text, a folder of text files, a .json array of texts or .jsonl")
    return UsageError(f"--data {str(path)!r} is not UTF-8 text; {way_out}")


def is_dataset(folder: Path) -> bool:
    """Whether save_to_disk() of the package datasets has made the folder."""
    there = [(folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")]
    return there[0] or (there[1] and there[2])


def read_dataset(folder: Path, field: TextField) -> list[bytes]:
    """The texts of a saved dataset: of its split ``train`` where it has several. UsageError where the package datasets
    is missing, or the folder is of another form."""
    where = f"--data {str(folder)!r}"
    if find_spec("datasets") is None:
        raise UsageError(
            f"{where} is a dataset of Hugging Face, which the package datasets reads: pip install datasets, or save it"
            " as JSON lines (to_json) where that package is"
        )
    try:
        loaded: Any = import_module("datasets").load_from_disk(str(folder))
    except Exception as error:  # datasets and pyarrow raise of many kinds; the cause stays attached
        raise UsageError(f"{where} cannot be read as a dataset: {' '.join(str(error).split())}") from error
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded), "")
        if split != "train" and len(loaded) != 1:
            raise UsageError(f"{where} has the splits {', '.join(map(repr, loaded))}; give the folder of one of them")
        loaded = loaded[split]
    columns = loaded.features
    of_text = [name for name, kind in columns.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    name = field.choose(of_text, where)
    if name not in of_text:
        raise UsageError(f"{where} has no texts in {name!r}; columns of texts: {', '.join(of_text) or 'none'}")
    return [_encoded(text) for text in loaded[name] if text]


def _plain(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return _utf8(file)
    except OSError as error:
        raise UsageError(f"--data {str(path)!r} cannot be read: {error.strerror or error}") from error


def _compressed(path: Path, module: str) -> bytes | None:
    try:
        opened: Callable[[Path], Any] = import_module(module).open
        with opened(path) as file:
            return _utf8(file)
    except Exception as error:  # of four modules, one of which a Python may lack
        raise UsageError(f"--data {str(path)!r} cannot be decompressed: {error}") from error


def _utf8(file: BinaryIO) -> bytes | None:
    """All of the file; None as soon as a block of it can't be text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    blocks: list[bytes] = []
    while block := file.read(_BLOCK_BYTES if blocks else _FIRST_BYTES):
        blocks.append(block)
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            return None
        if b"\0" in block:
            return None
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None
    return b"".join(blocks)


def _of_lines(path: Path, content: bytes, field: TextField) -> list[bytes]:
    documents: list[bytes] = []
    name = ""
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"--data {str(path)!r}: line {number}"
        record = _parsed(line, where, _LINES)
        text, name = _text_of(record, name, field, where, _LINES)
        documents.append(text)
    return [text for text in documents if text]


def _of_array(path: Path, content: bytes, field: TextField) -> list[bytes]:
    where = f"--data {str(path)!r}"
    try:
        records = _parsed(content, where, _ARRAY)
    except UsageError as refused:
        error = refused.__cause__
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and "\n" in error.doc[: error.pos]:
            return _of_lines(path, content, field)  # JSON lines often have this suffix
        raise
    if not isinstance(records, list):
        raise UsageError(f"{where} holds a JSON {type(records).__name__}; {_ARRAY}")
    documents: list[bytes] = []
    name = ""
    for index, record in enumerate(records):
        text, name = _text_of(record, name, field, f"{where}: item {index} of the array", _ARRAY)
        documents.append(text)
    return [text for text in documents if text]


def _parsed(text: bytes, where: str, wanted: str) -> Any:
    """What JSON ``text`` stands for. UsageError where it is none; ``wanted``: what must be there."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply; {wanted}") from None
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON ({error}); {wanted}") from error


def _array_or_text(content: bytes) -> list[bytes]:
    """A file of a folder: an array of texts, or any other JSON as the text that it is."""
    if content.lstrip()[:1] == b"[":
        try:
            texts = json.loads(content)
            if texts and all(isinstance(text, str) for text in texts):
                return [_encoded(text) for text in texts if text]
        except (ValueError, RecursionError):
            pass
    return [content] if content else []


def _text_of(record: Any, name: str, field: TextField, where: str, wanted: str) -> tuple[bytes, str]:
    """The text of a record, and the name of its field. ``name``: of the records before; "": this is the first."""
    if isinstance(record, str):
        return _encoded(record), name
    if not isinstance(record, dict):
        raise UsageError(f"{where} is of type {type(record).__name__}; {wanted}")
    name = name or field.choose([key for key, value in record.items() if isinstance(value, str)], where)
    if name not in record:
        raise UsageError(f"{where} has no field {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
    text = record[name]
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where} has a {type(text).__name__} in {name!r}, and not a text")
    return _encoded(text or ""), name


def _encoded(text: str) -> bytes:
    # JSON can spell half of a surrogate pair, which no UTF-8 can hold.
    return text.encode(errors="replace")
