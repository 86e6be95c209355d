"""Text to token ids: bytes as they are, or a trained tokenizer from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import UsageError

_END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """Text (UTF-8 bytes) to token ids. `separator` ends every document; None where the vocabulary has no such token."""

    name: str
    vocab_size: int
    separator: int | None

    def encode(self, text: bytes) -> np.ndarray: ...

    def encode_with_bytes(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and how many bytes of `text` each of them stands for; their sum is len(text)."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8. Id 0 separates documents: no text file holds a NUL."""

    name = "bytes"
    vocab_size = 256
    separator: int | None = 0

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def encode_with_bytes(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        return self.encode(text), np.ones(len(text), np.int32)


class FileTokenizer:
    """A tokenizer.json, or a folder that transformers' AutoTokenizer can open. Adds no special tokens but the
    separator."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._tokenizer = _open_tokenizer(Path(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the largest one counts, not how many there are.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.separator = next((vocabulary[token] for token in _END_OF_TEXT if token in vocabulary), None)

    def encode(self, text: bytes) -> np.ndarray:
        return np.array(self._tokenizer.encode(text.decode(), add_special_tokens=False).ids, np.int32)

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


def _open_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file or folder; transformers is imported only for folders without a
    tokenizer.json."""
    if not path.exists():
        raise UsageError(
            f"--tokenizer {str(path)!r}: no such file or folder; give 'bytes', or the path of a tokenizer.json or of a"
            " folder that transformers' AutoTokenizer can open"
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            from tokenizers import Tokenizer as FastTokenizer

            return FastTokenizer.from_file(str(file))
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # both libraries raise bare Exceptions of many kinds; the cause stays attached
        raise UsageError(f"--tokenizer {str(path)!r} cannot be read as a tokenizer: {error}") from error
    if not getattr(loaded, "is_fast", False):
        raise UsageError(f"--tokenizer {str(path)!r} has no fast version; convert it to a tokenizer.json first")
    return loaded.backend_tokenizer


def open_tokenizer(name: str) -> Tokenizer:
    """'bytes', or the path of a tokenizer.json or tokenizer folder. UsageError where there is none."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)
