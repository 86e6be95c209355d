"""What is done to the bytes that ranks exchange: the native loops of kernels/, with plain torch beside each.

Every function takes contiguous CPU tensors and element offsets (into the flat tensor), so that callers cut no
slices: `reduce(dst, 100, src, 0, 50, "sum")` works on dst[100:150] and src[0:50].

16-bit numbers are computed in fp32 and rounded to nearest even once per call; integers wrap; in min and max
NaN wins (of two zeros that differ only in sign, either may be returned). Both implementations give
the same bits but for the payload of NaNs. Which one runs is told by `backend()`.
"""

from __future__ import annotations

from commlab.native.arithmetic import accumulate, divide, narrow, reduce, reduce_rows, scale, widen
from commlab.native.cuda import CudaPackPlan, cuda_backend
from commlab.native.library import backend, backends, using
from commlab.native.pack import PackPlan

__all__ = [
    "CudaPackPlan",
    "PackPlan",
    "accumulate",
    "backend",
    "backends",
    "cuda_backend",
    "divide",
    "narrow",
    "reduce",
    "reduce_rows",
    "scale",
    "using",
    "widen",
]
