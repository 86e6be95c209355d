"""Text to tokens: what is read, what is refused, and that no byte is lost, doubled, or on both sides of the split."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commlab.errors import UsageError
from commlab.trainer.data.corpus import Corpus, load_corpus
from commlab.trainer.data.text import HELD_OUT_EVERY, _split, read_text
from commlab.trainer.data.tokenizer import ByteTokenizer, open_tokenizer

MIXED = "naïve façade — 东京 🚂  tail\n"


def texts_of(tokens: np.ndarray) -> list[bytes]:
    """The documents behind byte tokens."""
    assert tokens.dtype == np.uint8
    assert tokens[-1] == 0, "every document ends with the separator"
    return tokens.tobytes()[:-1].split(b"\0")


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE, trained here, in which characters of several bytes fall into several tokens."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([MIXED * 3, "def f(x):\n    return x\n" * 9], vocab_size=290, special_tokens=["</s>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_one_file_holds_out_its_last_lines(tmp_path: Path) -> None:
    lines = [f"line {index} {MIXED}".encode() for index in range(200)]
    (tmp_path / "text.txt").write_bytes(b"".join(lines))
    corpus = load_corpus(str(tmp_path / "text.txt"))
    [train], [held_out] = texts_of(corpus.train), texts_of(corpus.held_out)
    assert train + held_out == b"".join(lines)
    assert train.endswith(b"\n")
    assert 0.04 < len(held_out) / corpus.text_bytes < 0.06
    assert (corpus.documents, corpus.skipped_files, corpus.vocab_size, corpus.separator) == (1, 0, 256, 0)
    assert corpus.held_out_bytes.tolist() == [1] * len(held_out) + [0]


def test_folder_is_read_in_path_order_without_what_is_not_text(tmp_path: Path) -> None:
    texts = {f"{name}/{index:02}.txt": f"{name} {index}\n".encode() for name in ("b", "a") for index in range(30)}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    for folder in ("a/__pycache__", ".hidden"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "no.txt").write_bytes(b"not to be read")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    corpus = load_corpus(str(tmp_path))
    ordered = [texts[name] for name in sorted(texts)]
    held_out = ordered[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    assert texts_of(corpus.held_out) == held_out
    assert texts_of(corpus.train) == [text for text in ordered if text not in held_out]
    assert (corpus.documents, corpus.skipped_files) == (60, 2)
    assert "60 documents" in corpus.summary()
    assert "2 files that are not UTF-8 text skipped" in corpus.summary()


def test_json_array_is_one_document_each(tmp_path: Path) -> None:
    texts = [f"text {index} {MIXED}" for index in range(45)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps([*texts, "", "\ud800"]))
    corpus = load_corpus(str(path))
    assert sorted(texts_of(corpus.train) + texts_of(corpus.held_out)) == sorted([*(t.encode() for t in texts), b"?"])


def test_default_is_the_running_pythons_library() -> None:
    corpus = load_corpus()
    documents = texts_of(corpus.train) + texts_of(corpus.held_out)
    assert corpus.text_bytes == sum(map(len, documents)) > 5_000_000
    assert len(documents) == corpus.documents
    library = Path(sysconfig.get_path("stdlib"))
    assert (library / "argparse.py").read_bytes() in documents
    assert (library / "json" / "decoder.py").read_bytes() in documents
    assert Path(np.__file__).read_bytes() not in documents, "installed packages are not the library"
    assert int(corpus.held_out_bytes.sum()) == sum(map(len, texts_of(corpus.held_out)))


@given(st.lists(st.text(max_size=40).map(str.encode), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_split_keeps_every_byte_and_every_character(documents: list[bytes]) -> None:
    train, held_out = _split(documents)
    if len(documents) >= 2 * HELD_OUT_EVERY:
        assert sorted(train + held_out) == sorted(documents)
        assert len(held_out) == len(documents) // HELD_OUT_EVERY
    elif any(map(len, held_out)) and len(train) == len(documents):
        assert [a + b for a, b in zip(train, held_out, strict=True)] == documents
        for part in train + held_out:
            part.decode()  # cut between characters
    else:
        assert sorted([*train, *held_out]) == sorted(documents) or train == documents


def test_bpe_tokens_stand_for_every_byte(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(tokenizer_file))
    assert (tokenizer.vocab_size, tokenizer.separator) == (290, 0)
    for text in (MIXED.encode(), b" leading", b"", "🚂🚂".encode(), b"def f(x):\n"):
        ids, token_bytes = tokenizer.encode_with_bytes(text)
        assert len(ids) == len(token_bytes)
        assert np.array_equal(ids, tokenizer.encode(text))
        assert token_bytes.sum() == len(text)
        assert (token_bytes >= 0).all()
    (tmp_path / "a.txt").write_text(MIXED * 100)
    corpus = load_corpus(str(tmp_path / "a.txt"), str(tokenizer_file))
    assert corpus.train.dtype == np.uint16
    assert corpus.train[-1] == corpus.held_out[-1] == 0
    assert tokenizer.decode(corpus.train[:-1].tolist()) == MIXED * 95
    assert corpus.held_out_bytes.sum() == 5 * len(MIXED.encode())


def test_tokenizer_folders(tokenizer_file: Path, tmp_path: Path) -> None:
    assert open_tokenizer(str(tokenizer_file.parent)).vocab_size == 290
    # A folder as transformers saved it before there was a tokenizer.json.
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = open_tokenizer(str(tmp_path))
    ids, token_bytes = tokenizer.encode_with_bytes(b"Hello worlds")
    assert (ids.tolist(), token_bytes.tolist(), tokenizer.separator) == ([5, 6, 7], [5, 6, 1], 3)


def test_bytes_are_their_own_tokens() -> None:
    ids, token_bytes = ByteTokenizer().encode_with_bytes(MIXED.encode())
    assert ids.tobytes() == MIXED.encode()
    assert token_bytes.tolist() == [1] * len(MIXED.encode())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, ["no such file"]),
        ("empty.txt", b"", ["holds no text"]),
        ("short.txt", b"abc", ["too short", "3 bytes", "each part needs 2"]),
        ("26.txt", bytes(range(97, 123)), ["too short", "26 bytes", "give more text"]),
        ("binary.txt", b"a\0b", ["not UTF-8 text"]),
        ("latin.txt", "é".encode("latin-1"), ["not UTF-8 text"]),
        ("object.json", b'{"text": "a"}', ["JSON dict", "array of texts"]),
        ("numbers.json", b'["a", 2]', ["item 1", "type int", "array of texts"]),
        ("broken.json", b'["a', ["not valid JSON", "array of texts"]),
        ("none.json", b"[]", ["holds no text"]),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, words: list[str]) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_corpus(str(path))
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


@pytest.mark.parametrize("count", [2, 12, 39])
def test_short_texts_are_held_out_whole(tmp_path: Path, count: int) -> None:
    """Short data: texts of which a twentieth is nothing."""
    texts = [f"text {index}" for index in range(count)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    corpus = load_corpus(str(tmp_path / "texts.json"))
    train, held_out = texts_of(corpus.train), texts_of(corpus.held_out)
    assert sorted(train + held_out) == sorted(text.encode() for text in texts)
    assert len(held_out) == max(1, count // HELD_OUT_EVERY)


def test_a_tokenizer_that_cuts_nowhere_is_the_one_at_fault(tmp_path: Path) -> None:
    """Tokenizers: 1 token for 60 kB is no short text."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]")).save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("word word\n" * 6000)
    with pytest.raises(UsageError, match=r"words.json' makes 2 tokens of the 60,000 bytes .*another tokenizer"):
        load_corpus(str(tmp_path / "a.txt"), str(tmp_path / "words.json"))


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0\1")
    with pytest.raises(UsageError, match=r"holds no text .1 files skipped"):
        load_corpus(str(tmp_path))


def test_what_the_run_writes_is_no_text(tmp_path: Path) -> None:
    """A folder that holds output and data: a second run, or one that goes on, has the text of the first."""
    (tmp_path / "a.txt").write_text("first line\n" * 50)
    first = read_text(str(tmp_path))
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    (tmp_path / "out/checkpoints/manifest.json").write_text("{}")
    (tmp_path / "run.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "link").symlink_to("out")
    written = [str(tmp_path / name) for name in ("out", "run.jsonl", "gone")]
    again = read_text(str(tmp_path), written=written)
    assert again.digest() == first.digest()
    assert again.notes == ("3 files or folders of this run's own left out",)


def test_a_file_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("first line\n" * 50)
    really = os.scandir

    def scandir(folder: Path) -> list[os.DirEntry[str]]:
        found = list(really(folder))
        (tmp_path / "a.txt").unlink()
        return found

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=r"a\.txt' cannot be read: No such file or directory"):
        read_text(str(tmp_path))


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file or folder; give 'bytes'"):
        open_tokenizer(str(tmp_path / "gone.json"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="cannot be read as a tokenizer"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"none of tokenizer.json, .*; it has nothing"):
        open_tokenizer(str(tmp_path / "folder"))
    with pytest.raises(UsageError, match=r"nothing is downloaded"):
        open_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"cannot be read as a tokenizer: .{10,300}$"):
        open_tokenizer(str(tmp_path))


def test_a_tokenizer_of_other_words_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("another text\n" * 60 + "word\n" * 40)
    with pytest.raises(UsageError, match=r"lacks the words of .*: 80% of the tokens"):
        load_corpus(str(tmp_path / "a.txt"), str(tmp_path / "words.json"))


def test_folders_of_a_vocabulary_alone(tmp_path: Path) -> None:
    """Tokenizer folders: as the tokenizers library saves a model."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([MIXED * 3], vocab_size=270, special_tokens=["<|endoftext|>"])
    (tmp_path / "bpe").mkdir()
    trained.save_model(str(tmp_path / "bpe"))
    opened = open_tokenizer(str(tmp_path / "bpe"))
    assert opened.separator == 0
    assert opened.encode(MIXED.encode()).tolist() == trained.encode(MIXED).ids
    for words, text in ((["hello", "##s"], "Hellos"), (["Hello", "##s"], "Hellos")):
        (tmp_path / words[0]).mkdir()
        (tmp_path / words[0] / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]))
        assert open_tokenizer(str(tmp_path / words[0])).encode(text.encode()).tolist() == [4, 5]


def test_corpus_is_small_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100_000)
    corpus: Corpus = load_corpus(str(tmp_path / "a.txt"))
    assert corpus.train.nbytes + corpus.held_out.nbytes == 100_002, "one byte per byte of text, and two separators"
