"""Formats of --data: each read rightly, or refused in one sentence that names the file and the place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commlab.errors import UsageError
from commlab.trainer.data.text import Text, read_text

TEXTS = [f"text {number} of naïve 东京\n" for number in range(45)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def documents(*paths: str, field: str | None = None) -> list[str]:
    return in_order(read_text(paths, field))


def in_order(text: Text) -> list[str]:
    """The documents before the split, where it took every 20th."""
    train, found = [item.decode() for item in text.train], []
    for index, held_out in enumerate(text.held_out):
        found += [*train[19 * index : 19 * (index + 1)], held_out.decode()]
    return found + train[19 * len(text.held_out) :]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json", "a.jsonl.gz", "a.jsonl.bz2", "a.json.xz"])
@pytest.mark.parametrize("kind", ["texts", "text", "only", "given"])
def test_records(name: str, kind: str) -> None:
    """JSON lines: texts, and objects whose field is found or given; under the suffix .json too, and compressed."""
    records: list[Any] = {
        "texts": TEXTS,
        "text": [{"id": 1, "url": "u", "text": text} for text in TEXTS],
        "only": [{"id": 1, "body": text} for text in TEXTS],
        "given": [{"url": "u", "answer": text, "text": "other"} for text in TEXTS],
    }[kind]
    records = [*records[:7], {"text": None, "body": None, "answer": None}, *records[7:]] if kind != "texts" else records
    content = ("\ufeff" if name == "a.jsonl" else "") + lines(records).replace("\n", "\r\n\n", 2)
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    Path(name).write_bytes(packers.get(Path(name).suffix, bytes)(content.encode()))
    assert documents(name, field="answer" if kind == "given" else None) == TEXTS


def test_arrays_of_records() -> None:
    Path("a.json").write_text(json.dumps([{"content": text, "id": "x"} for text in TEXTS]))
    assert documents("a.json") == TEXTS


def test_compressed_text() -> None:
    Path("a.txt.gz").write_bytes(gzip.compress("".join(TEXTS).encode()))
    Path("b.gz").write_bytes(gzip.compress(b"b\n") + gzip.compress(b"c\n"))
    text = read_text(["a.txt.gz", "b.gz"])
    assert [a + b for a, b in zip(text.train, text.held_out, strict=True)] == ["".join(TEXTS).encode(), b"b\nc\n"]
    assert text.source == "--data 'a.txt.gz' and 1 more"


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "field", "words"),
    [
        ("a.json", DEEP, None, "is nested too deeply"),
        ("a.jsonl", '{"text": ' + DEEP, None, "line 1 is nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', None, "line 2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n{"txet": "b"}', None, "line 2 has no field 'text'; it has 'txet'"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ["b"]}', None, "line 3 has a list in 'text', and not a text"),
        ("a.jsonl", '{"title": "a", "body": "b"}', None, "texts are in 'title', 'body'; say which with --text-field"),
        ("a.jsonl", '{"id": 1}', None, "line 1 has no field 'text', and no field is one"),
        ("a.jsonl", '{"text": "a"}', "body", "line 1 has no field 'body'; it has 'text'"),
        ("a.jsonl", "[1]", None, "line 1 is of type list; each line must be"),
        ("a.json", '[{"text": "a"}, 3]', None, "item 1 of the array is of type int"),
        ("a.txt", "plain", "text", "--text-field 'text' is for JSON lines and datasets, and --data 'a.txt' has none"),
        ("a.gz", "plain", None, "cannot be decompressed: "),
        ("a.parquet", "PAR1\0", None, "save_to_disk()"),
        ("a.tar.gz", gzip.compress(b"ustar\0", mtime=0), None, "is not UTF-8 text"),
        ("cut.gz", gzip.compress(os.urandom(1000).hex().encode())[:-20], None, "cannot be decompressed: "),
    ],
)
def test_what_cannot_be_read(name: str, content: str | bytes, field: str | None, words: str) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        read_text([name], field)
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 500


def test_paths_that_are_no_files() -> None:
    os.mkfifo("pipe")
    Path("nowhere").symlink_to("gone")
    Path("a.txt").write_text("a\n")
    Path("b.txt").symlink_to("a.txt")
    for path, words in (
        ("pipe", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        ("nowhere", "is a link to 'gone', which does not exist"),
    ):
        with pytest.raises(UsageError, match=words):
            read_text(path)
    with pytest.raises(UsageError, match=r"'b.txt' and 'a.txt' are the same"):
        read_text(["a.txt", "b.txt"])


def test_a_folder_of_everything() -> None:
    """Links are followed, round and round too, and nothing is read twice; each file by its own format."""
    Path("data/sub").mkdir(parents=True)
    Path("elsewhere/more").mkdir(parents=True)
    for path, text in (
        ("data/b.jsonl", lines([{"text": "b1"}, {"text": "b2"}])),
        ("data/c.json", json.dumps(["c1", "c2"])),
        ("data/package.json", '{"name": "kept"}'),
        ("data/sub/d.txt", "d"),
        ("elsewhere/e.txt", "e"),
        ("elsewhere/more/f.txt", "f"),
        ("outside.txt", "g"),
    ):
        Path(path).write_text(text)
    Path("data/a.txt.gz").write_bytes(gzip.compress(b"a"))
    Path("data/image").write_bytes(b"\x89PNG\0")
    Path("data/link").symlink_to("../elsewhere")
    Path("elsewhere/round").symlink_to("../data")
    Path("data/again").symlink_to("sub")
    Path("data/g.txt").symlink_to("../outside.txt")
    Path("data/h.txt").symlink_to("sub/d.txt")
    Path("data/i.txt").symlink_to("gone")
    os.link("data/sub/d.txt", "data/sub/hard.txt")
    os.mkfifo("data/pipe")
    text = read_text("data")
    found = [a + b for a, b in zip(text.train, text.held_out, strict=True)] if len(text.held_out) > 1 else []
    found = found or [*text.train, *text.held_out]
    assert sorted(found) == sorted([b"a", b"b1", b"b2", b"c1", b"c2", b"d", b"e", b"f", b"g", b'{"name": "kept"}'][:10])
    assert (text.documents, text.skipped_files) == (10, 1)
    assert text.notes == (
        "1 links that lead nowhere left out",
        "4 links to what is read already left out",
        "1 pipes or devices left out",
    )


def test_a_big_binary_is_skipped_without_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders with big binaries: no more is read than shows that they are none of text."""
    Path("data").mkdir()
    with open("data/sparse.bin", "wb") as file:
        file.truncate(1 << 40)
    with open("data/late.bin", "wb") as file:
        file.write(b"a" * 3_000_000 + b"\xff")
        file.truncate(1 << 40)
    Path("data/a.txt").write_text("a\n" * 100)
    assert read_text("data").skipped_files == 2


class Dataset:
    """As much of datasets.Dataset as is used."""

    def __init__(self, columns: dict[str, list[Any]]):
        self.columns = columns
        self.features = {
            name: types.SimpleNamespace(dtype="string" if isinstance(values[0], str) else "int64")
            for name, values in columns.items()
        }

    def __getitem__(self, name: str) -> Iterator[Any]:
        return iter(self.columns[name])


@pytest.mark.parametrize("files", [["dataset_dict.json"], ["dataset_info.json", "state.json"]])
def test_a_dataset_without_its_package(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commlab.trainer.data.formats.find_spec", lambda _: None)
    for name in files:
        Path(name).write_text("{}")
    with pytest.raises(UsageError, match=r"is a dataset of Hugging Face, .*pip install datasets"):
        read_text(".")


def test_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets on disk, by a stand-in for the package; the column is found or given."""
    loaded: Any = None
    module = types.ModuleType("datasets")
    module.load_from_disk = lambda folder: loaded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("commlab.trainer.data.formats.find_spec", lambda _: module)
    Path("dataset_dict.json").write_text("{}")
    table = Dataset({"id": [1] * 46, "text": [*TEXTS, None], "title": ["t"] * 46})
    for dataset in (table, {"test": None, "train": table}, {"validation": table}):
        loaded = dataset
        assert documents(".") == TEXTS
    assert documents(".", field="title") == ["t"] * 46
    with pytest.raises(UsageError, match="has no texts in 'id'; columns of texts: text, title"):
        documents(".", field="id")
    loaded = {"a": table, "b": table}
    with pytest.raises(UsageError, match="has the splits 'a', 'b'; give the folder of one"):
        documents(".")


def test_a_real_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"id": [1] * 45, "text": TEXTS})}).save_to_disk("d")
    assert documents("d") == TEXTS
    assert documents("d/train") == TEXTS
