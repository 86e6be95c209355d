"""Horovod's errors under their names."""

from __future__ import annotations

from .submission import HorovodInternalError


class HostsUpdatedInterrupt(RuntimeError):
    """Hosts were added or removed: raised by Horovod's own launcher, which commlab has not; programs may name it."""

    def __init__(self, skip_sync: bool = False):
        super().__init__("hosts were updated")
        self.skip_sync = skip_sync


__all__ = ["HorovodInternalError", "HostsUpdatedInterrupt"]
