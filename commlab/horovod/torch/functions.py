"""State from one rank to all: parameters, an optimizer's state, objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...checkpoint import pickled
from ...errors import UsageError
from .. import world
from ..process_sets import ProcessSet, global_process_set
from .mpi_ops import allgather_async, broadcast_async, broadcast_async_
from .start import synchronize


def broadcast_parameters(params: Any, root_rank: int, process_set: ProcessSet = global_process_set) -> None:
    """Overwrite parameters and buffers with those of ``root_rank``. ``params``: a ``state_dict()``, or a sequence of
    pairs of names and tensors. What is no tensor in it is left alone."""
    if isinstance(params, Mapping):
        items = list(params.items())
    elif isinstance(params, Iterable) and not isinstance(params, torch.Tensor):
        items = [item if isinstance(item, tuple) else (str(index), item) for index, item in enumerate(params)]
    else:
        raise ValueError(f"invalid params of type {type(params).__name__}: give a state_dict() or named_parameters()")
    items = [(name, tensor) for name, tensor in items if isinstance(tensor, torch.Tensor)]
    handles = [broadcast_async_(tensor.detach(), root_rank, str(name), process_set) for name, tensor in items]
    for handle in handles:
        synchronize(handle)


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """The object of ``root_rank`` on every rank; elsewhere ``obj`` means nothing. Anything that can be pickled; its
    tensors travel as they are."""
    name = name or type(obj).__name__
    is_root = world.rank() == root_rank
    data, tensors = pickled.dumps_apart(obj) if is_root else (b"", [])
    size = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
    length = int(synchronize(broadcast_async_(size, root_rank, f"{name}.size", process_set)))
    content = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(length, dtype=torch.uint8, device="cpu")
    )
    synchronize(broadcast_async_(content, root_rank, f"{name}.object", process_set))
    if not is_root:
        obj, tensors = pickled.loads_apart(content.numpy().tobytes())
    sent = [
        (broadcast_async(tensor, root_rank, f"{name}.tensor.{index}", process_set), tensor)
        if is_root
        else (broadcast_async_(tensor, root_rank, f"{name}.tensor.{index}", process_set), tensor)
        for index, tensor in enumerate(tensors)
    ]
    for handle, _ in sent:
        synchronize(handle)
    return obj


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Every rank's object on every rank, in rank order. Anything that can be pickled."""
    name = name or type(obj).__name__
    data = torch.frombuffer(bytearray(pickled.dumps_any(obj)), dtype=torch.uint8)
    sizes = allgather_async(torch.tensor([data.numel()], device="cpu"), f"{name}.sizes", process_set)
    whole = synchronize(allgather_async(data, f"{name}.objects", process_set))
    return [pickled.loads(piece.numpy().tobytes()) for piece in whole.split(synchronize(sizes).tolist())]


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer, root_rank: int, model: torch.nn.Module | None = None
) -> None:
    """Give every rank the state and the options of ``root_rank``'s optimizer, whichever it is. The optimizers of all
    ranks must have the same parameters, in the same order. ``model`` means nothing here."""
    process_set = getattr(optimizer, "process_set", global_process_set)
    if not process_set.included():
        return
    is_root = world.rank() == root_rank
    state = broadcast_object(optimizer.state_dict() if is_root else None, root_rank, "optimizer_state", process_set)
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state["param_groups"]]
    if ours != theirs:
        raise UsageError(
            f"rank {world.rank()}: broadcast_optimizer_state: the optimizer of rank {root_rank} has groups of {theirs} "
            f"parameters, this rank's has {ours}"
        )
    if not is_root:
        optimizer.load_state_dict(state)
    if not state["state"]:
        # Programs of Horovod find gradients after this call, because it takes a step where there is no state.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
