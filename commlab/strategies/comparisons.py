"""What ranks have copies of is compared now and then, so that ranks that have drifted apart are named instead of
averaged, and buffers that forward has written are made alike. A step comes here where one of the two is due."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any

from ..gradients.parameters import parameters_by_name
from ..runtime.control import gather_bytes
from .copies import require_alike
from .protocol import Strategy


class Comparisons:
    """The comparisons of the ranks that train by ``strategy``."""

    def __init__(self, strategy: Strategy):
        self._strategy, self._training = strategy, strategy.training
        self.written_steps = 0
        """Steps in a row before which a rank had written parameters."""
        self.took_note()

    def took_note(self) -> None:
        """What this rank has now, all ranks have."""
        self._training.structure.took_note()
        self._training.buffers.seen()

    def compare_replicas(self, written: bool, due: bool) -> None:
        """Compare what all ranks have copies of, where ranks have ``written`` parameters before this step, or where it
        is ``due``. Collective, before anything is updated."""
        if self._training.group.size == 1:
            return
        # A loop that writes parameters after each of its steps has them compared ever less often.
        self.written_steps = self.written_steps + 1 if written else 0
        if due or (self.written_steps and not self.written_steps & (self.written_steps - 1)):
            self._compare()

    def _compare(self) -> None:
        """Compare what ranks have copies of. Collective."""
        require_alike(self._training.group, self._training.steps, self._copies())
        self._strategy.compare_shards()

    def _copies(self) -> Iterator[tuple[str, Any]]:
        """What must be equal on all ranks, by name. Buffers become alike by their rule instead."""
        training = self._training
        yield from self._strategy.replicas()
        trained = {item.name for item in training.parameters}
        for name, tensor in parameters_by_name(training.model):
            if name not in trained:
                yield repr(name), tensor.detach()

    def make_buffers_alike(self, written: int, due: bool) -> None:
        """Make the buffers that ranks have ``written`` in this step, a bit for each, alike by their rule, and all of
        them where it is ``due``. Collective."""
        buffers = self._training.buffers
        if written:
            buffers.make_alike(written)
        if due:
            buffers.make_all_alike()

    def settle(self) -> None:
        """Make buffers alike, and compare what all ranks have copies of. Collective."""
        training = self._training
        if training.group.size == 1:
            return
        if training.buffers.count:
            own = training.buffers.written().to_bytes(8, "little")
            everyones = gather_bytes(training.group, own, "buffers that were written")
            training.buffers.make_alike(reduce(or_, (int.from_bytes(each, "little") for each in everyones)))
            training.buffers.make_all_alike()
        self._compare()
