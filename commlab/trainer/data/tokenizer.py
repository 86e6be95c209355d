"""Tokenizers: from text to token ids and back, by the bytes themselves or by a trained tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import UsageError

_END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""A tokenizer folder has at least one of them."""
_PIECE_CHARACTERS = 1 << 18
_LONGEST_CHARACTERS = 1 << 20
"""A text is cut after the first end of a word behind so many characters, and after the most in any case: the library
takes 150 times the memory of a text that it encodes at once."""
_TOKEN_END = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
"""Positions where a byte-level token always ends: a single end of a line is a token by itself, and a token of a word
begins with the space before the word."""


class Tokenizer(Protocol):
    """Turns text (UTF-8 bytes) into token ids, and back."""

    name: str
    vocab_size: int
    separator: int | None
    """The token that ends every document; None where the vocabulary has no such token."""
    unknown: int | None
    """The token for words that the vocabulary lacks; None: it lacks none, or none is known."""
    slow: bool
    """Whether encoding is so slow that ranks had better share the work."""

    def pieces(self, text: bytes) -> list[bytes]:
        """``text``, cut into pieces that are encoded one by one, so that a long text takes no more memory than a short
        one; the cuts depend on the text alone. There is at least one piece, perhaps an empty one."""
        ...

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of ``text``, without a separator."""
        ...

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, encoded by the library's own threads where it has some."""
        ...

    def encode_with_bytes(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and how many bytes of ``text`` each id stands for; the sum of these is len(text)."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text that these ids stand for; bytes that are no UTF-8 are replaced by U+FFFD."""
        ...

    def digest(self) -> bytes:
        """Equal exactly for equal vocabularies and rules."""
        ...

    def save(self, folder: str) -> None:
        """Write the tokenizer beside a model, where transformers' AutoTokenizer finds it; bytes need no file."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8. Id 0 separates documents: no text file holds a NUL."""

    name = "bytes"
    vocab_size = 256
    separator: int | None = 0
    unknown: int | None = None
    slow = False

    def pieces(self, text: bytes) -> list[bytes]:
        return [text]

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_with_bytes(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        return self.encode(text), np.ones(len(text), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def digest(self) -> bytes:
        return blake2b(b"bytes", digest_size=16).digest()

    def save(self, folder: str) -> None:
        pass


class TrainedTokenizer:
    """A tokenizer of the tokenizers library. It adds no special tokens but the separator."""

    slow = True

    def __init__(self, name: str, opened: Any) -> None:
        self.name, self._tokenizer = name, opened
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the largest one counts, not how many there are.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.separator = next((vocabulary[token] for token in _END_OF_TEXT if token in vocabulary), None)
        self.unknown = vocabulary.get(getattr(self._tokenizer.model, "unk_token", None) or "")

    def pieces(self, text: bytes) -> list[bytes]:
        """For a byte-level BPE that commlab has learned the pieces have the tokens of the whole, but in a text that has
        no end of a word for 768 Ki characters. Where other tokenizers let a token end is not known: their tokens may
        differ at a cut, which lies between two words."""
        if len(text) <= _PIECE_CHARACTERS:
            return [text]
        characters = text.decode()
        cuts = [0]
        while (begin := cuts[-1] + _PIECE_CHARACTERS) < len(characters):
            end = cuts[-1] + _LONGEST_CHARACTERS
            found = _TOKEN_END.search(characters, begin, end)
            cuts.append(found.start() if found else min(end, len(characters)))
        if cuts[-1] < len(characters):
            cuts.append(len(characters))
        return [characters[begin:end].encode() for begin, end in pairwise(cuts)]

    def encode(self, text: bytes) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        # Without offsets, where the library can: a quarter less time.
        encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        encodings = encode([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_bytes(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        characters = text.decode()
        encoding = self._tokenizer.encode(characters, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if not len(ids):
            return ids, np.zeros(0, np.int32)
        code_points = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        width_bytes = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
        end_bytes = np.concatenate([[0], np.cumsum(width_bytes)])[[end for _, end in encoding.offsets]]
        # Differences of the ends, not lengths of the spans: tokens that share a character, and white space that belongs
        # to no token, are then counted exactly once.
        end_bytes = np.maximum.accumulate(end_bytes)
        end_bytes[-1] = len(text)
        return ids, np.diff(end_bytes, prepend=0).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def digest(self) -> bytes:
        return blake2b(self._tokenizer.to_str().encode(), digest_size=16).digest()

    def save(self, folder: str) -> None:
        from transformers import PreTrainedTokenizerFast

        end = None if self.separator is None else self._tokenizer.id_to_token(self.separator)
        PreTrainedTokenizerFast(tokenizer_object=self._tokenizer, eos_token=end).save_pretrained(folder)


def _open_file(path: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of a file or folder; transformers is imported only for folders without a
    tokenizer.json."""
    where = f"--tokenizer {str(path)!r}"
    try:
        os.stat(path)
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UsageError(f"{where} cannot be read as a tokenizer: {error.strerror or error}") from error
        raise UsageError(
            f"{where}: no such file or folder; give 'bytes', 'bpe' for one that is trained on the text, or the path of"
            " a tokenizer.json or of a folder that transformers' AutoTokenizer can open (nothing is downloaded)"
        ) from None
    try:
        file = path / "tokenizer.json" if path.is_dir() else path
        if path.is_dir() and not any((path / name).is_file() for name in _FILES):
            there = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise UsageError(
                f"{where} cannot be read as a tokenizer: the folder has none of {', '.join(_FILES)}; it has {there}"
            )
        if file.exists():
            from tokenizers import Tokenizer as FastTokenizer

            return FastTokenizer.from_file(str(file))
        return _of_vocabulary(path) or _of_transformers(path)
    except UsageError:
        raise
    except Exception as error:  # both libraries raise bare Exceptions of many kinds; the cause stays attached
        cause = " ".join(str(error).split())[:300]
        raise UsageError(f"{where} cannot be read as a tokenizer: {cause}") from error


def _of_vocabulary(path: Path) -> Any:
    """The tokenizer of a folder that has nothing but its vocabulary: a byte-level BPE, as GPT-2's, or WordPiece, as
    BERT's. None for other folders."""
    if any((path / name).exists() for name in ("config.json", "tokenizer_config.json")):
        return None
    from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"))._tokenizer
    if (path / "vocab.txt").exists():
        words = (path / "vocab.txt").read_text(encoding="utf-8").splitlines()
        lower = all(word.islower() or not word.isalpha() for word in words)
        return BertWordPieceTokenizer(str(path / "vocab.txt"), lowercase=lower)._tokenizer
    return None


def _of_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    if not getattr(loaded, "is_fast", False):
        raise UsageError(f"--tokenizer {str(path)!r} has no fast version; convert it to a tokenizer.json first")
    return loaded.backend_tokenizer


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer ``name``: 'bytes', or the path of a tokenizer.json or tokenizer folder. UsageError where there is
    none."""
    if name == "bytes":
        return ByteTokenizer()
    opened = TrainedTokenizer(name, _open_file(Path(name)))
    if opened.vocab_size < 2:
        raise UsageError(f"--tokenizer {name!r} has a vocabulary of {opened.vocab_size}; give one with its words")
    return opened
