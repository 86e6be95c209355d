"""The numbers and the shapes on which the packs are tested, on the processor and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that show a number's bits, by its size in bytes."""

INF, NAN = float("inf"), float("nan")
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 6.1e-5, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
EDGES += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 65504.0, 65519.0, 65520.0, -65536.0, 3.38e38, 3.4e38, -3.4e38, INF, -INF, NAN]
"""Numbers around the edges of fp16 and bf16: signed zeros, subnormals of all three formats, the last finite, ties."""

SHAPES = [(), (1,), (0,), (7,), (3, 5), (31,), (64,), (257, 3), (1000,), (1025, 2100)]
"""From no number and one to more than the 8 MiB, read and written, from which on stores go past the caches."""


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether all numbers have the same bits, where any NaN equals any NaN."""
    got, want = got.reshape(-1), want.reshape(-1)
    equal = got.view(BITS[got.element_size()]) == want.view(BITS[want.element_size()])
    return bool((equal | (got.isnan() & want.isnan())).all())
