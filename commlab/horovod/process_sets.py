"""Process sets: operations among some of the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ..errors import UsageError


class ProcessSet:
    """The ranks ``ranks_or_comm`` of the job (a sequence of numbers, or an mpi4py communicator), once it was given to
    ``init`` or :func:`.world.add_process_set`. ``process_set_id`` is None until then."""

    process_set_id: int | None = None
    ranks: list[int] | None = None
    here: ClassVar[int | None] = None
    """This process's rank in the job; None outside of one."""

    def __init__(self, ranks_or_comm: Any):
        if ranks_or_comm is None:
            return
        if hasattr(ranks_or_comm, "Get_group"):
            ranks_or_comm = _ranks_of(ranks_or_comm)
        ranks = sorted(int(rank) for rank in ranks_or_comm)
        if len(set(ranks)) != len(ranks) or not ranks or ranks[0] < 0:
            raise UsageError(f"{list(ranks_or_comm)} is not a set of ranks")
        self.ranks = ranks

    def _require(self) -> list[int]:
        if self.here is None:
            raise UsageError("Horovod has not been initialized; use hvd.init().")
        if self.process_set_id is None or self.ranks is None:
            raise UsageError(f"{self!r} is not registered: give it to hvd.init() or hvd.add_process_set() first")
        return self.ranks

    def included(self) -> bool:
        """Whether this rank is in the set."""
        return self.here in self._require()

    def size(self) -> int:
        """How many ranks there are in the set."""
        return len(self._require())

    def rank(self) -> int:
        """This rank's number in the set. UsageError on a rank that is not in it."""
        ranks = self._require()
        if self.here not in ranks:
            raise UsageError(f"rank {self.here} is not in {self!r}")
        return ranks.index(self.here)

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ProcessSet):
            return NotImplemented
        return self.process_set_id == other.process_set_id and self.ranks == other.ranks

    def __hash__(self) -> int:
        return hash(self.process_set_id)

    def __reduce__(self) -> Any:
        return (_by_number, (self.process_set_id, self.ranks))


class _All(ProcessSet):
    """All ranks of the job."""

    process_set_id = 0

    def __reduce__(self) -> Any:
        return "global_process_set"


global_process_set: ProcessSet = _All(None)


def _by_number(number: int | None, ranks: Sequence[int] | None) -> ProcessSet:
    made = ProcessSet(ranks)
    made.process_set_id = number
    return made


def _ranks_of(comm: Any) -> list[int]:
    """The ranks of an mpi4py communicator, as the job counts them."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD.Get_group()
    group = comm.Get_group()
    found = MPI.Group.Translate_ranks(group, list(range(group.Get_size())), world)
    return [int(rank) for rank in found]
