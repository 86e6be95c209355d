"""What an operation needs of its process group, and what it gives its caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..runtime.group import Group
from ..runtime.handle import Handle
from .tensors import Tensors
from .work import CommlabWork

Work = CommlabWork | None
"""None where the operation is left to gloo (:mod:`.fallback`)."""


class Members(Protocol):
    """What an operation needs of its process group."""

    @property
    def group(self) -> Group: ...

    def rank(self) -> int: ...

    def size(self) -> int: ...

    def begin(self, kind: str, tensors: Tensors) -> Any:
        """The span of an operation in torch's profile; None where nothing is recorded."""

    def work(
        self, handles: Sequence[Handle], value: Any, after: Callable[[], None] | None = None, span: Any = None
    ) -> CommlabWork:
        """What the caller is given."""


class WorkToBe(NamedTuple):
    """What an operation comes to: what its work gives, what remains to be done, its span in torch's profile, and
    whether the caller waits for it."""

    value: Any
    after: Callable[[], None] | None
    span: Any
    awaited: bool

    @property
    def at_once(self) -> bool:
        """Whether the operation may have ended before its caller has the work."""
        return self.awaited and self.span is None

    def over(self, pg: Members) -> CommlabWork:
        """The work of what has ended."""
        if self.after is not None:
            with torch.no_grad():
                self.after()
        return pg.work((), self.value)

    def of(self, pg: Members, handle: Handle) -> CommlabWork:
        """The work of what is under way."""
        return pg.work((handle,), self.value, self.after, self.span)
