"""Which tensors a collective takes, and the same tensors as plain, dense memory. What no collective can do is refused
here, before anything is sent."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from hashlib import blake2b

import torch

from ..errors import UsageError

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
"""Classes whose tensors are certainly memory and nothing else."""

PAGE_BITS = mmap.PAGESIZE.bit_length() - 1
writable_pages: set[int] = set()
"""Pages of memory (address >> PAGE_BITS) that were found to be writable not long ago."""

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""By the bytes of a number: the dtype as which numbers are moved that are not computed with."""

_QUANTIZED = (torch.quint8, torch.qint8, torch.qint32)


def described(tensor: object) -> str:
    """``float32[3, 4]`` for messages, of whatever the caller has given."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    try:
        return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    except RuntimeError:  # nested tensors have no one shape
        return f"{str(tensor.dtype).removeprefix('torch.')}[...]"


def readable(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor as plain, dense numbers, without its gradient's history: the same memory, but for a view that negates
    or conjugates its memory, which is copied. UsageError for what has no numbers of its own. ``where``: the words
    before the reason."""
    plain = _plain(tensor, where)
    return plain.resolve_conj().resolve_neg() if plain.is_conj() or plain.is_neg() else plain


def writable(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor as dense numbers in its own memory, to be written in place: numbers that share memory with each other,
    and memory that this process may only read, are refused."""
    if surely_writable(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    plain = _plain(tensor, where)
    if _overlaps(plain):
        raise UsageError(
            f"{where}: several of its numbers share one place in memory (expand() and as_strided() do that), which "
            "can't be written in place; give a .clone()"
        )
    if plain.is_cpu and plain.numel() and not _may_write(plain):
        raise UsageError(
            f"{where}: its memory may only be read (a file mapped read-only, or an array that is not writable); give "
            "a .clone()"
        )
    return plain


def surely_writable(tensor: torch.Tensor) -> bool:
    """Whether :func:`writable` would give the tensor itself, known without a system call: contiguous on the CPU, with
    both ends on pages that were found to be writable."""
    if (
        type(tensor) not in PLAIN
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or not (tensor.is_cpu and tensor.is_contiguous())
    ):
        return False
    try:
        start = tensor.data_ptr()
    except RuntimeError:
        return False
    last = start + max(0, tensor.nbytes - 1)
    return start >> PAGE_BITS in writable_pages and last >> PAGE_BITS in writable_pages


def _plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    kind = type(tensor)
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(
            f"{where}: a torch.fx.Proxy stands for a tensor that symbolic_trace does not have; torch.fx.wrap() the"
            " function, and the call stays in the graph"
            if kind.__module__ == "torch.fx.proxy"
            else f"{where}: that is no tensor; give a torch.Tensor"
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise UsageError(f"{where}: a {kind.__name__} has no numbers yet; run a forward pass first")
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise UsageError(
            f"{where}: a {layout} tensor is not one dense block of numbers; give its parts, or .to_dense()"
        )
    if kind not in PLAIN:
        # A subclass that has only other functions is memory like any other; one that stands before other tensors isn't.
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise UsageError(
                f"{where}: a {kind.__name__} stands for other tensors and has no numbers itself; give a plain tensor"
            )
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(torch.Tensor)
    if tensor.is_meta:
        raise UsageError(f"{where}: a tensor on device meta has no numbers; give it memory first (to_empty())")
    try:
        tensor.data_ptr()
    except RuntimeError as error:  # inside vmap, grad and their like
        raise UsageError(f"{where}: its memory can't be reached: {str(error).splitlines()[0]}") from error
    return tensor.detach() if tensor.requires_grad else tensor


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two numbers of the tensor lie at one place."""
    if tensor.numel() < 2 or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride == 0:
                return True
            if stride <= reach:
                break
            reach += stride * (size - 1)
    else:
        return False
    # Rare: strides that interlock may still never meet.
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + stride * torch.arange(size, device="cpu")).view(-1)
    return int(places.unique().numel()) < tensor.numel()


def _writable_probe() -> Callable[[int], bool]:
    """Whether the page at an address may be written, as the kernel says, which only looks."""
    populate_write = 23  # since Linux 5.14

    def unknown(address: int) -> bool:
        return True

    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return unknown
    madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    page = mmap.PAGESIZE

    def may_write(address: int) -> bool:
        if madvise(address // page * page, page, populate_write) != 0:
            return False
        if len(writable_pages) > 1024:
            writable_pages.clear()  # memory comes and goes
        writable_pages.add(address >> PAGE_BITS)
        return True

    own = torch.zeros(1, device="cpu")
    if not may_write(own.data_ptr()):  # an older kernel does not know the question
        return unknown
    return may_write


may_write_at = _writable_probe()


def _may_write(tensor: torch.Tensor) -> bool:
    last = sum(stride * (size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    ends = start, start + last * tensor.element_size()
    return all(end >> PAGE_BITS in writable_pages or may_write_at(end) for end in ends)


def carrier(tensor: torch.Tensor, where: str) -> tuple[torch.Tensor, str]:
    """The tensor in a dtype that torch copies bit for bit, whatever its own numbers mean: the same memory, but for a
    view that conjugates or negates its memory, which stays that view. And what ranks must agree on beside the bytes."""
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_conj() or tensor.is_neg():
        return tensor, f"bytes of {name}"
    if not tensor.is_quantized:
        return tensor.view(_CARRIERS[tensor.element_size()]), f"bytes of {name}"
    if tensor.dtype not in _QUANTIZED or not tensor.is_contiguous() or not tensor.is_cpu:
        raise UsageError(f"{where}: quantized tensors must be contiguous, on the CPU, and of 8 or 32 bits")
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scheme = f"scale {tensor.q_scale()}, zero point {tensor.q_zero_point()}"
    else:
        scales, points = tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist()
        channels = repr((tensor.q_per_channel_axis(), scales, points))
        scheme = f"scales of channels {blake2b(channels.encode(), digest_size=8).hexdigest()}"
    return as_bytes(tensor).view(_CARRIERS[tensor.element_size()]).view(tensor.shape), f"bytes of {name}, {scheme}"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous CPU tensor of any dtype, as 1-D uint8."""
    itemsize = tensor.element_size()
    nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
    return nothing.set_(
        tensor.untyped_storage(), tensor.storage_offset() * itemsize, (tensor.numel() * itemsize,), (1,)
    )
