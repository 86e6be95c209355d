"""Mirrors: a buffer twice, in a GPU's memory, where the model is, and in the host's, where the ranks meet.

    GPU     gradients --pack--> device --copy, its own stream--> host          device --> parameters, gradients
    cores                                                        host --reduce--> host

GPUs without NVLink reach each other through the host's memory anyway. One copy each way and bucket by bucket, so that
the copies hide behind backward and the reduction behind the copies. The host's side is pinned, which takes a copy from
half of the bus's rate to all of it; where it cannot be pinned the copies still come out right.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from ..chunks import Range
from ..native import library

_streams: dict[torch.device, torch.cuda.Stream] = {}
_pinned: dict[int, int] = {}
"""Address of host memory that is registered with CUDA, and for how many owners the memory is."""


def mirrors(device: torch.device) -> bool:
    """Whether buffers of parameters on ``device`` need a mirror."""
    return device.type != "cpu"


def pin(owner: object, memories: Sequence[torch.Tensor]) -> None:
    """Register host memory with CUDA for as long as ``owner`` lives, and keep the memory mapped. ``memories``: whole
    segments, because CUDA refuses a range of memory that is registered already. Memory that cannot be registered is
    copied more slowly."""
    if not torch.cuda.is_available() or not hasattr(library.built, "cuda_register"):
        return
    for memory in memories:
        address = memory.data_ptr()
        registered = address in _pinned
        if not registered and memory.numel():
            registered = library.built.cuda_register(address, memory.numel() * memory.element_size())
        if registered:
            _pinned[address] = _pinned.get(address, 0) + 1
            weakref.finalize(owner, _unpin, memory)


def _unpin(memory: torch.Tensor) -> None:
    # Before the memory is unmapped: CUDA would go on copying the old pages for whoever gets this address next.
    address = memory.data_ptr()
    _pinned[address] -= 1
    if not _pinned[address]:
        del _pinned[address]
        library.built.cuda_unregister(address)


class Mirror:
    """``host``: a 1-D tensor in CPU memory. ``device``: a tensor on a GPU, which has the numbers of ``host`` once they
    were copied.

    Copies run on one stream per GPU beside torch's current one, in the order of the calls.
    """

    def __init__(self, host: torch.Tensor, device: torch.device):
        self.host, self.device = host, torch.empty(host.shape, dtype=host.dtype, device=device)
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            if device not in _streams:
                _streams[device] = torch.cuda.Stream(device)
            self._stream, self._copied = _streams[device], torch.cuda.Event()
            weakref.finalize(self, self._stream.synchronize)

    def to_host(self, extent: Range | None = None) -> None:
        """Copy what the current stream has put into ``device``, or the range ``extent`` of it, to ``host``. Returns at
        once: :meth:`arrived` and :meth:`wait` tell when the numbers are there."""
        self._copy(self.host, self.device, extent)

    def to_device(self, extent: Range | None = None) -> None:
        """Copy ``host``, or the range ``extent`` of it, to ``device``: whatever the current stream does next sees the
        numbers, and until it does ``host`` must stay as it is."""
        self._copy(self.device, self.host, extent)
        if self._stream is not None:
            torch.cuda.current_stream(self.device.device).wait_stream(self._stream)

    def _copy(self, to: torch.Tensor, frm: torch.Tensor, extent: Range | None) -> None:
        if extent is not None:
            to, frm = to[extent.start : extent.stop], frm[extent.start : extent.stop]
        if self._stream is None or self._copied is None:
            to.copy_(frm)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device.device))
        with torch.cuda.stream(self._stream):
            to.copy_(frm, non_blocking=True)
            self._copied.record(self._stream)

    def arrived(self) -> bool:
        """Whether the last copy is done."""
        return self._copied is None or self._copied.query()

    def wait(self) -> None:
        """Block the host until the last copy is done."""
        if self._copied is not None:
            self._copied.synchronize()
