"""The corpus on every rank: each rank reads the text, one learns the tokenizer, and all encode the text together."""

from __future__ import annotations

from collections.abc import Sequence
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


def load_together(
    group: Group,
    paths: Sequence[str] | None,
    tokenizer: str,
    cache: Path,
    text_field: str | None = None,
    written: Sequence[str] = (),
) -> Corpus:
    """:func:`commlab.trainer.data.corpus.load_corpus` by all ranks of a group. Collective.

    Every rank reads the text by itself. With a slow tokenizer each rank encodes a share of the text, and ranks exchange
    the tokens. Rank 0 alone learns a BPE, or finds one in its ``cache``, and gives it to the other ranks, which wait
    for rank 0 as for any peer: at most --timeout. ``written``: as for :func:`commlab.trainer.data.text.read_text`.
    Errors: AgreedError on all ranks for a text or tokenizer that any of them can't read, and for texts or tokenizers
    that differ between ranks.
    """
    text = raise_together(group, lambda: read_text(paths, text_field, written))
    _require_same(
        group, text.digest(), "text", "give the same --data on all hosts; without it, they need the same Python"
    )
    opened = _opened(group, text, tokenizer, cache)
    _require_same(group, opened.digest(), f"--tokenizer {tokenizer!r}", "give the same file on all hosts")
    if not opened.slow:
        return raise_together(group, lambda: assemble(text, opened, *_whole(text, opened)))
    train = encode(text.train, opened, group.rank, group.size, show=group.rank == 0)
    held_out, held_out_bytes = encode_with_bytes(text.held_out, opened, group.rank, group.size)
    dtype = dtype_for(opened)
    encoded = (
        _gathered(group, train, "training tokens").astype(dtype),
        _gathered(group, held_out, "held-out tokens").astype(dtype),
        _gathered(group, held_out_bytes, "bytes of held-out tokens"),
    )
    return raise_together(group, lambda: assemble(text, opened, *encoded))


def _whole(text: Text, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return encode(text.train, tokenizer), *encode_with_bytes(text.held_out, tokenizer)


def _opened(group: Group, text: Text, name: str, cache: Path) -> Tokenizer:
    size = bpe.size_of(name)
    if size is None:
        return raise_together(group, lambda: open_tokenizer(name))
    made = raise_together(group, lambda: bpe.vocabulary(text.train, size, cache, show=True) if group.rank == 0 else "")
    received = _gathered(group, np.frombuffer(made.encode(), np.uint8), "tokenizer")
    return raise_together(group, lambda: bpe.opened(received.astype(np.uint8).tobytes().decode(), size))


def _require_same(group: Group, digest: bytes, what: str, do: str) -> None:
    """AgreedError on all ranks, unless all have the same digest. ``do``: how the user can make them the same."""
    digests = exchange_records(group, digest, "what is trained on")
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise AgreedError(
            f"{what} differs: rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} of {group.size} read other"
            f" content than rank 0; {do}"
        )


def _gathered(group: Group, row: np.ndarray, name: str) -> np.ndarray:
    """All ranks' rows, one behind the other in rank order, as int32."""
    if group.size == 1:
        return row
    ends = np.cumsum([0, *gather_int(group, len(row), name)]).tolist()
    chunks = [Range(begin, end) for begin, end in pairwise(ends)]
    flat = torch.empty(ends[-1], dtype=torch.int32, device="cpu")
    own = chunks[group.rank]
    flat[own.start : own.stop] = torch.from_numpy(row.astype(np.int32))
    gather_chunks_async(flat, chunks, name, group=group).wait()
    return flat.numpy()
