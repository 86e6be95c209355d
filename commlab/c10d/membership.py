"""This process's membership in a process group: how the group is opened and ended, by which names C++ and torch's own
functions know it, and which memory it has. What the group does with tensors is in :mod:`.process_group`."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import AgreedError, UsageError
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..transport.gloo import set_default
from .connect import Member, connect
from .fallback import connects_lazily, leave, make_gloo, refusal_of
from .tensors import movable
from .window_tensor import tensor_in
from .work import CommlabWork, Futures, Kept, torch_keeps_works

_kept: list[Membership] = []
"""All groups that were ever made. C++ holds the half of a group that is written there; if the half that is written here
went first, DDP's reducer would find a group without a backend."""


@atexit.register
def _end_threads() -> None:
    """The interpreter must not meet a thread of ours on its way out. Nobody is waited for."""
    for group in _kept:
        group.end_threads()


# The stubs have every version's names and overloads at once, which no class could satisfy.
_ProcessGroup: Any = dist.ProcessGroup


class Membership(_ProcessGroup):  # type: ignore[misc]
    """Ranks that share ``store``, in which no other keys are. Made by each member alone; the members meet when the
    first operation is called. ``timeout``: how long a silent peer is waited for. ``name``: what get_backend() answers.
    ``here``: this process in the job; default: the group has all ranks of the job."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: timedelta,
        name: str = "commlab",
        here: Member | None = None,
    ):
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._store, self._timeout, self._name = store, timeout, name
        self._here, self._destroyed = here or Member(rank, size), False
        self._lock = threading.Lock()
        self._group: Group | None = None
        self._futures = Futures(threaded=False)
        self._kept_works = None if torch_keeps_works() else Kept()
        self._plain: dist.ProcessGroup | None = None
        self._sequence = self._barriers = 0
        self._group_name = self._group_desc = "undefined"
        set_default(self, dist.ProcessGroup.BackendType.CUSTOM)
        _kept.append(self)
        # C++ looks for gloo's own backend in a group that bears its name.
        if name == "gloo" or (size > 1 and not connects_lazily()):
            self._gloo()

    # From torch 2.14 C++ asks a group's backends for these, of which this one has none until gloo is needed.

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    getRank, getSize = rank, size

    def __repr__(self) -> str:
        return f"<CommlabProcessGroup {self._name}, rank {self.rank()} of {self.size()}>"

    @property
    def group(self) -> Group:
        """commlab's group; opened by the first operation, of all members."""
        if self._group is None:
            with self._lock:
                if self._group is None:
                    timeout_s = self._timeout.total_seconds()
                    if self._destroyed:
                        raise UsageError(f"rank {self.rank()}: an operation on a process group that was destroyed")
                    group = connect(self._store, self.rank(), self.size(), timeout_s, self._here)
                    # A thread that waits for links sleeps, and takes no core from the computation.
                    self._futures.threaded = group.progress.threaded or group.transport.moves_itself
                    self._group = group
        return self._group

    def begin(self, kind: str, tensors: Sequence[torch.Tensor]) -> Any:
        """The span of an operation in torch's profile, where one is recorded: a future, and the span ends when the
        future is complete. The work of the operation completes the future."""
        if not torch.autograd._profiler_enabled():
            return None
        record = torch.autograd._record_function_with_args_enter(f"{self._name}:{kind}", *tensors)
        end: Any = torch.futures.Future()
        # The callback takes this thread's profiler along: up to torch 2.6 a span that is ended in a thread that has no
        # profiler is lost.
        torch.ops.profiler._call_end_callbacks_on_jit_fut(record, end)
        return end

    def work(
        self, handles: Sequence[Handle], value: Any, after: Callable[[], None] | None = None, span: Any = None
    ) -> CommlabWork:
        self._sequence += 1
        work = CommlabWork(self._futures, handles, value, after, span)
        if self._kept_works is not None:
            self._kept_works.keep(work)
        return work

    def _gloo(self) -> Any:
        if self._plain is None:
            with self._lock:
                if self._plain is None:
                    plain: Any = make_gloo(self._store, self.rank(), self.size(), self._timeout)
                    cpu, kinds = torch.device("cpu"), dist.ProcessGroup.BackendType
                    # For methods that C++ calls and Python can't override.
                    for kind in (kinds.CUSTOM, *([kinds.GLOO] if self._name == "gloo" else [])):
                        self._register_backend(cpu, kind, plain._get_backend(cpu))
                    self._plain = plain
        return self._plain

    def _left(
        self,
        kind: str,
        sent: Any,
        outs: Any,
        start: Callable[[Any], Any],
        detail: str = "",
        *,
        shape: tuple[int, ...] = (),
        reduction: Any = None,
        after: Callable[[], None] | None = None,
    ) -> CommlabWork:
        """A collective for gloo. ``sent``: tensors of the dtype that all ranks have; ``shape``: what else must be
        equal, where anything must; ``reduction``: what gloo may not have for the dtype; ``start(gloo)`` gives its
        work; ``after()``: what remains to be done here."""
        sample = sent
        while not isinstance(sample, torch.Tensor):
            sample = sample[0]
        known = reduction is not None and movable(sample)
        if known and (refusal := refusal_of(reduction, sample.dtype)):
            error = AgreedError(f"rank {self.rank()}: {refusal}")
            return self.work((self.group.refuse(kind, None, error),), outs)
        gloo = self._gloo()
        handle = leave(self.group, kind, sample, detail, outs, lambda: start(gloo), shape=shape)
        return self.work((handle,), outs, after)

    # --- Life

    def end_threads(self) -> None:
        """End what runs beside the program, once it has completed what it was given."""
        self._futures.close()
        if self._group is not None:
            self._group.progress.close()

    def shutdown(self) -> None:
        """Release the window and the links. Works that were started stay what they are. Not collective."""
        self.end_threads()
        group, self._group, self._destroyed = self._group, None, True
        # The memory goes with the last work that needs it.
        if group is not None and group.window is not None:
            group.window.close()
        if group is not None and group.transport.moves_itself:
            group.transport.close()

    abort = shutdown

    def getBackendName(self) -> str:
        return self._name

    _get_backend_name = name = getBackendName

    # C++ keeps a group's name in its backends, of which this one has none until gloo is needed.

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def _set_group_desc(self, desc: str) -> None:
        self._group_desc = desc

    setGroupName, setGroupDesc = _set_group_name, _set_group_desc

    @property
    def group_name(self) -> str:
        return self._group_name

    @property
    def group_desc(self) -> str:
        return self._group_desc

    def getGroupName(self) -> str:
        return self._group_name

    def getGroupDesc(self) -> str:
        return self._group_desc

    def get_group_store(self) -> dist.Store:
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: Any) -> Any:
        """This group is its own backend, for every device."""
        return self

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        """Whether :meth:`allocate_tensor` has memory for this device. Opens the group, so all members must ask."""
        return torch.device(device).type == "cpu" and self.group.window is not None

    def allocate_tensor(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A 1-D tensor in the window, with whatever it held before; collectives on it copy nothing. FSDP2 asks for it
        (``set_allocate_memory_from_process_group_for_comm``). The memory is given back when the tensor is gone."""
        window = self.group.window
        if window is None:
            return torch.empty(numel, dtype=dtype, device=device)
        return tensor_in(window, numel, dtype)

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        if self._group is not None:
            self._group.timeout_s = self._group.progress.timeout_s = timeout.total_seconds()

    set_timeout = _set_default_timeout

    def _set_sequence_number_for_group(self) -> None:
        """Nothing: a group begins to count at zero on all ranks."""

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _has_hooks(self) -> bool:
        return False

    def _wait_for_pending_works(self) -> None:
        """Nothing waits for hooks."""
