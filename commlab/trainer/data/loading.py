"""The text on every rank: read by each, its tokenizer learned by one, its tokens made by all together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ...chunks import Range
from ...collectives.halves import gather_chunks_async
from ...errors import AgreedError
from ...runtime.control import exchange_records, gather_int, raise_together
from ...runtime.group import Group
from . import bpe
from .corpus import Corpus, assemble, dtype_for, encode, encode_with_bytes
from .text import Text, read_text
from .tokenizer import Tokenizer, open_tokenizer


def load_together(group: Group, path: str | None, tokenizer: str, cache: Path) -> Corpus:
    """:func:`commlab.trainer.data.corpus.load_corpus` by all ranks of a group. Collective.

    Every rank reads the text by itself. With a tokenizer that takes its time each encodes a part, and the parts are
    exchanged. Rank 0 alone learns a BPE, or finds it in its ``cache``, and gives it to the others, who wait for it
    as for any peer: at most --timeout.
    Errors: AgreedError on all ranks for what any of them can't read, and for text or tokenizers that differ.
    """
    text = raise_together(group, lambda: read_text(path))
    _same(group, text.digest(), "text", "give the same --data on all hosts; without it, they need the same Python")
    opened = _opened(group, text, tokenizer, cache)
    _same(group, opened.digest(), f"--tokenizer {tokenizer!r}", "give the same file on all hosts")
    if not opened.slow:
        return raise_together(group, lambda: assemble(text, opened, *_whole(text, opened)))
    train = encode(text.train, opened, group.rank, group.size, show=group.rank == 0)
    held_out, held_out_bytes = encode_with_bytes(text.held_out, opened, group.rank, group.size)
    dtype = dtype_for(opened)
    parts = (
        _gathered(group, train, "training tokens").astype(dtype),
        _gathered(group, held_out, "held-out tokens").astype(dtype),
        _gathered(group, held_out_bytes, "bytes of held-out tokens"),
    )
    return raise_together(group, lambda: assemble(text, opened, *parts))


def _whole(text: Text, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return encode(text.train, tokenizer), *encode_with_bytes(text.held_out, tokenizer)


def _opened(group: Group, text: Text, name: str, cache: Path) -> Tokenizer:
    size = bpe.size_of(name)
    if size is None:
        return raise_together(group, lambda: open_tokenizer(name))
    made = raise_together(group, lambda: bpe.vocabulary(text.train, size, cache, show=True) if group.rank == 0 else "")
    given = _gathered(group, np.frombuffer(made.encode(), np.uint8), "tokenizer")
    return raise_together(group, lambda: bpe.opened(given.astype(np.uint8).tobytes().decode(), size))


def _same(group: Group, digest: bytes, what: str, do: str) -> None:
    digests = exchange_records(group, digest, "what is trained on")
    others = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if others:
        raise AgreedError(
            f"{what} differs: rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} of {group.size} read other"
            f" content than rank 0; {do}"
        )


def _gathered(group: Group, part: np.ndarray, name: str) -> np.ndarray:
    """All ranks' parts in rank order, as int32."""
    if group.size == 1:
        return part
    ends = np.cumsum([0, *gather_int(group, len(part), name)]).tolist()
    chunks = [Range(begin, end) for begin, end in pairwise(ends)]
    flat = torch.empty(ends[-1], dtype=torch.int32)
    own = chunks[group.rank]
    flat[own.start : own.stop] = torch.from_numpy(part.astype(np.int32))
    gather_chunks_async(flat, chunks, name, group=group).wait()
    return flat.numpy()
