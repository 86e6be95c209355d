"""DistributedOptimizer: the user's optimizer, with what exchanges its gradients before it; also copied and pickled."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ...errors import UsageError
from ..process_sets import ProcessSet, global_process_set
from .compression import Compression
from .distributed import Distributed, DistributedDelta
from .start import Adasum, Average, ReduceOp

_OPTIONS = (
    "_compression", "backward_passes_per_step", "op", "gradient_predivide_factor", "sparse_as_dense", "process_set",
)  # fmt: skip
_classes: dict[tuple[type, type], type] = {}
_kinds: dict[type, tuple[type, type]] = {}


def _reduced(me: Any) -> Any:
    """How a made optimizer is copied and pickled: by its state, its options, and its parameters' places."""
    order = [p for group in me.param_groups for p in group["params"]]
    groups = me._groups
    if isinstance(groups, list):
        index = {id(p): index for index, p in enumerate(order)}
        groups = [[index[id(p)] for p in group if id(p) in index] for group in groups]
    options = {name: getattr(me, name) for name in _OPTIONS}
    names = [me._parameter_names[p] for p in order]
    kind, base = _kinds[type(me)]
    return _rebuild, (kind, base, me.__getstate__(), options, names, groups)


def _made_class(kind: type, base: type) -> type:
    """The class that is ``kind`` and, behind it, the optimizer's own; named as the optimizer's."""
    made = _classes.get((kind, base))
    if made is None:
        made = _classes[kind, base] = type(
            base.__name__, (kind, base), {"__module__": base.__module__, "__reduce__": _reduced}
        )
        _kinds[made] = kind, base
    return made


def _rebuild(
    kind: type, base: type, state: dict[str, Any], options: dict[str, Any], names: list[str], groups: Any
) -> Any:
    made: Any = object.__new__(_made_class(kind, base))
    made.__setstate__(state)
    made.__dict__.update(options)
    order = [p for group in made.param_groups for p in group["params"]]
    made._parameter_names = dict(zip(order, names, strict=True))
    made._groups = [[order[index] for index in group] for group in groups] if isinstance(groups, list) else groups
    made._begin()
    return made


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Any = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """An optimizer of the same class, parameters and state, whose ``step()`` waits until all gradients are averaged
    over ranks; each begins its way as soon as backward has computed it.

    ``named_parameters``: pairs of names and parameters, by which ranks match gradients (default: by their places).
    ``compression``: what travels. ``backward_passes_per_step``: so many backward passes are added up here before their
    sum travels. ``op``: Average, Sum or Adasum. ``gradient_predivide_factor``: of an average, divide by it before
    adding up, and by the rest after. ``num_groups`` or ``groups`` (lists of parameters): gradients that travel as one
    operation. ``sparse_as_dense``: sparse gradients travel dense. ``process_set``: the ranks that average.
    """
    op = ReduceOp(op)
    if gradient_predivide_factor != 1.0 and op != Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if num_groups:
        warnings.warn("Parameter `num_groups` has been replaced by `groups`", DeprecationWarning, stacklevel=2)
        groups = groups or num_groups
    if groups is not None and not (isinstance(groups, list) or groups > 0):
        raise ValueError("groups should be a non-negative integer or a list of list of torch.Tensor.")
    if isinstance(groups, list):
        members = [p for group in groups for p in group]
        if not all(isinstance(p, torch.Tensor) for p in members):
            raise ValueError("groups must consist of torch.Tensor.")
        if len({id(p) for p in members}) != len(members):
            raise ValueError("A parameter can only appear once in groups.")
    kind = DistributedDelta if op == Adasum else Distributed
    if type(optimizer) in _kinds:
        raise UsageError("DistributedOptimizer of a DistributedOptimizer: give the optimizer itself")
    made: Any = object.__new__(_made_class(kind, type(optimizer)))
    made.__dict__.update(optimizer.__dict__)
    made.__dict__.pop("step", None)  # a scheduler's, which counts the calls of the other one
    made._compression, made.op, made.process_set = compression, op, process_set
    made.backward_passes_per_step = backward_passes_per_step
    made.gradient_predivide_factor, made.sparse_as_dense = gradient_predivide_factor, sparse_as_dense
    made._parameter_names, made._groups = _names(optimizer, named_parameters), groups
    made._begin()
    return made


def _names(optimizer: torch.optim.Optimizer, named_parameters: Any) -> dict[torch.Tensor, str]:
    order = [(f"{i}.{j}", p) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])]
    if named_parameters is None:
        return {p: f"allreduce.noname.{index}" for index, p in order}
    named = list(named_parameters)
    if not all(isinstance(item, tuple) for item in named):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()."
        )
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(twice)}")
    found = {p: name for name, p in named}
    unnamed = [index for index, p in order if p not in found]
    if unnamed:
        raise ValueError(
            "named_parameters was specified, but one or more model parameters were not named: those at group.index "
            f"{', '.join(unnamed)} of the optimizer"
        )
    return found
