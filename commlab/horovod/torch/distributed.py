"""What stands before the class of an optimizer to make it a distributed one: gradients are averaged over ranks while
backward goes on, each as soon as it is complete."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from .. import world
from ..process_sets import global_process_set
from .functions import broadcast_object
from .start import Adasum, Average, start_gradient, start_reduce, start_sparse, synchronize


class Distributed:
    """Stands before the class of the user's optimizer: the made object is both. Everything of the optimizer is the
    optimizer's own, its state, its groups and what schedulers and scalers do with them."""

    def _begin(self) -> None:
        """Watch the parameters' gradients."""
        me: Any = self
        me._handles, me._hooks = {}, []
        me._synchronized, me._should_synchronize = False, True
        me._requires_update = [p for group in me.param_groups for p in group["params"] if p.requires_grad]
        me._delays = dict.fromkeys(me._requires_update, me.backward_passes_per_step)
        me._group_of, me._arrived = {}, {}
        if me._takes_part():
            self._form_groups()
        reference = weakref.ref(self)

        def arrived(p: torch.Tensor) -> None:
            # An optimizer that nobody has any more watches no gradients.
            optimizer = reference()
            if optimizer is not None:
                optimizer._arrived_hook(p)

        for p in me._requires_update:
            me._hooks.append(p.register_post_accumulate_grad_hook(arrived))

    def _takes_part(self) -> bool:
        """Whether there is somebody to exchange gradients with."""
        me: Any = self
        return world.is_initialized() and world.size() > 1 and me.process_set.included() and me._set_size() > 1

    def _set_size(self) -> int:
        me: Any = self
        return world.size() if me.process_set is global_process_set else me.process_set.size()

    def _form_groups(self) -> None:
        me: Any = self
        if not me._groups:
            return
        names = broadcast_object(
            [me._parameter_names[p] for p in me._requires_update],
            0 if me.process_set is global_process_set else me.process_set.ranks[0],
            "optimizer_groups",
            me.process_set,
        )
        index = {name: index for index, name in enumerate(names)}
        known = sorted(me._requires_update, key=lambda p: index.get(me._parameter_names[p], len(index)))
        if isinstance(me._groups, int):
            count = min(me._groups, max(1, len(known)))
            bounds = [len(known) * index // count for index in range(count + 1)]
            groups = [known[first:last] for first, last in pairwise(bounds)]
        else:
            chosen = {id(p) for group in me._groups for p in group}
            groups = [[p for p in group if p.requires_grad] for group in me._groups]
            groups += [[p] for p in known if id(p) not in chosen]
        for group in groups:
            whole = tuple(group)
            for p in whole:
                me._group_of[p] = whole

    def _arrived_hook(self, p: torch.Tensor) -> None:
        """A gradient has been accumulated."""
        me: Any = self
        if not me._takes_part():
            return
        if me._delays[p] <= 0:
            raise AssertionError(
                f"parameter {me._parameter_names[p]!r}: gradients were computed more than "
                f"backward_passes_per_step={me.backward_passes_per_step} times before step(): its gradient is on its "
                "way already. Raise backward_passes_per_step (set_backward_passes_per_step), or call step() or "
                "synchronize() before the next backward"
            )
        me._synchronized = False
        me._delays[p] -= 1
        if me._delays[p]:
            return
        group = me._group_of.get(p)
        if group is None or (p.grad is not None and p.grad.is_sparse):
            me._handles[p] = self._start(p)
            return
        waiting = me._arrived.setdefault(group, set())
        waiting.add(p)
        if len(waiting) == len(group):
            del me._arrived[group]
            me._handles[group] = self._start_group(group)

    def _scales(self) -> tuple[float, float]:
        me: Any = self
        factor = me.gradient_predivide_factor
        return (1.0 / factor, factor) if me.op == Average else (1.0, 1.0)

    def _start(self, p: torch.Tensor) -> Any:
        """What ends the exchange of a parameter's gradient, when called."""
        me: Any = self
        name, gradient = me._parameter_names[p], p.grad
        if gradient is not None and gradient.is_sparse:
            if not me.sparse_as_dense:
                return self._start_sparse(p, gradient, name)
            was_sparse, gradient = True, gradient.to_dense()
        else:
            was_sparse = False
        return self._start_dense(p, gradient, name, was_sparse)

    def _start_sparse(self, p: torch.Tensor, gradient: torch.Tensor, name: str) -> Callable[[], None]:
        me: Any = self
        values, ctx = me._compression.compress(gradient.coalesce()._values())
        sent = torch.sparse_coo_tensor(
            gradient.coalesce()._indices(), values, gradient.shape, check_invariants=False, device=values.device
        )
        # A rank that has no gradient announces a dense one: both must match.
        handle = start_sparse(sent, name, me.op, me.process_set, "allreduce")

        def end() -> None:
            found = synchronize(handle).coalesce()
            p.grad = torch.sparse_coo_tensor(
                found._indices(),
                me._compression.decompress(found._values(), ctx),
                found.shape,
                check_invariants=False,
                device=found.device,
            )

        return end

    def _start_dense(
        self, p: torch.Tensor, gradient: torch.Tensor | None, name: str, was_sparse: bool
    ) -> Callable[[], None]:
        me: Any = self
        own = gradient.detach() if gradient is not None else None
        room = own if own is not None else torch.empty_like(p, requires_grad=False).detach()
        sent, ctx = me._compression.compress(room)
        handle = start_gradient(sent, own is None, name, me.op, self._scales(), me.process_set)

        def end() -> None:
            found = synchronize(handle)
            if found is None:  # no rank has computed this gradient
                return
            if found.is_sparse:
                found = found.coalesce()
                values = found._values().to(p.dtype)
                p.grad = torch.sparse_coo_tensor(
                    found._indices(), values, found.shape, check_invariants=False, device=values.device
                )
                return
            whole = me._compression.decompress(found, ctx)
            if was_sparse:
                p.grad = whole.to_sparse()
            elif p.grad is None:
                p.grad = whole.to(p.dtype)
            elif whole.data_ptr() != p.grad.data_ptr():
                p.grad.detach().copy_(whole)

        return end

    def _start_group(self, group: Sequence[torch.Tensor]) -> Callable[[], None]:
        me: Any = self
        absent = all(p.grad is None for p in group)
        for p in group:
            if p.grad is None and not absent:
                p.grad = torch.zeros_like(p)
        rooms = [torch.empty_like(p).detach() if p.grad is None else p.grad.detach() for p in group]
        pairs = [me._compression.compress(room) for room in rooms]
        sent, name = [pair[0] for pair in pairs], f"group of {me._parameter_names[group[0]]}"
        handle = start_reduce(sent, sent, name, me.op, self._scales(), me.process_set, None, absent)

        def end() -> None:
            for p, found, (_, ctx) in zip(group, synchronize(handle), pairs, strict=False):
                whole = me._compression.decompress(found, ctx)
                if p.grad is None:
                    p.grad = whole
                elif whole.data_ptr() != p.grad.data_ptr():
                    p.grad.detach().copy_(whole)

        return end

    def synchronize(self) -> None:
        """Return once all gradients are averaged. Those that this rank has not computed, or not as often as
        ``backward_passes_per_step``, take part too; a gradient that no rank has computed stays None."""
        me: Any = self
        if me._takes_part():
            done = {p for key in me._handles for p in (key if isinstance(key, tuple) else (key,))}
            for group in {me._group_of[p] for p in me._group_of}:
                # All ranks send a group as one operation or none: who lacks gradients of it takes part with zeros.
                if group not in me._handles and not any(p in done for p in group):
                    me._handles[group] = self._start_group(group)
                    done.update(group)
            for p in me._requires_update:
                if p not in done:
                    me._handles[p] = self._start(p)
            handles, me._handles = list(me._handles.values()), {}
            me._arrived.clear()
            try:
                for end in handles:
                    end()
            finally:
                for p in me._delays:
                    me._delays[p] = me.backward_passes_per_step
        me._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within, ``step()`` does not call :meth:`synchronize`, which was called before: to clip or unscale."""
        me: Any = self
        me._should_synchronize = False
        try:
            yield
        finally:
            me._should_synchronize = True

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From now on gradients are averaged once ``passes`` of them have been added up here."""
        me: Any = self
        me.backward_passes_per_step = passes
        for p in me._delays:
            me._delays[p] = passes

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """:meth:`synchronize`, and the optimizer's own step. Gradients that ``closure`` computes are averaged too."""
        me: Any = self
        base: Any = super()
        if me._should_synchronize:
            if me._synchronized:
                warnings.warn(
                    "optimizer.step() called without optimizer.skip_synchronize() context after "
                    "optimizer.synchronize(): gradients are averaged a second time. Call step() within "
                    "`with optimizer.skip_synchronize():` if synchronize() was called by hand",
                    stacklevel=2,
                )
            if closure is None:
                self.synchronize()
        me._synchronized = False
        if closure is None:
            return base.step()

        def averaged() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.synchronize()
            me._synchronized = False
            return loss

        return base.step(averaged)

    def zero_grad(self, *arguments: Any, **options: Any) -> None:
        """The optimizer's own. AssertionError between backward and step, when gradients are on their way."""
        me: Any = self
        if me._handles:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        base: Any = super()
        base.zero_grad(*arguments, **options)

    def load_state_dict(self, state_dict: Any) -> None:
        """The optimizer's own; what was accumulated is forgotten."""
        me: Any = self
        me._handles, me._synchronized, me._should_synchronize = {}, False, True
        self.set_backward_passes_per_step(me.backward_passes_per_step)
        base: Any = super()
        base.load_state_dict(state_dict)


# torch would run a step's hooks around this one and around the optimizer's own.
Distributed.step.hooked = True  # type: ignore[attr-defined]


class DistributedDelta(Distributed):
    """For Adasum: each rank takes its own step, and the ranks' changes of the parameters are combined."""

    def _arrived_hook(self, p: torch.Tensor) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing: gradients stay a rank's own."""

    def skip_synchronize(self) -> Any:
        """AssertionError: there is nothing to be skipped."""
        raise AssertionError("skip_synchronize() is not supported with Adasum: gradients are not averaged")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's own step, and the Adasum of what it has changed."""
        me: Any = self
        parameters = [p for group in me.param_groups for p in group["params"] if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        base: Any = super(Distributed, self)
        loss = base.step() if closure is None else base.step(closure)
        if not self._takes_part():
            return loss
        handles = []
        for p, start in zip(parameters, before, strict=True):
            sent, ctx = me._compression.compress(p.detach() - start)
            name = f"delta.{me._parameter_names[p]}"
            handles.append((start_gradient(sent, False, name, Adasum, (1.0, 1.0), me.process_set), ctx))
        with torch.no_grad():
            for p, start, (handle, ctx) in zip(parameters, before, handles, strict=True):
                p.copy_(start.add_(me._compression.decompress(synchronize(handle), ctx)))
        return loss


DistributedDelta.step.hooked = True  # type: ignore[attr-defined]
