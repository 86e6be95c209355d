"""What one rank can't do, all ranks hear of."""

from __future__ import annotations

from ..runtime.group import Group


class Refusing:
    """``with`` it, all ranks hear of what is raised inside, in the place of the operation that they have started or
    will start: RefusedError on every rank. Nothing inside may tell the others anything itself."""

    __slots__ = ("_group", "_kind", "_name")

    def __init__(self, group: Group, kind: str, name: str | None):
        self._group, self._kind, self._name = group, kind, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self._group.refuse(self._kind, self._name, error).wait()
