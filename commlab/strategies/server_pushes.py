"""The pushes of ``ps`` where the node is the unit: what the ranks of a node have added up in its window travels to
rank 0 once, and so do the new parameters to each node.

    node          local rank l reduces shard l out of its node's memories                    (window)
    across        the ranks with local rank l reduce shard l to the server's node            (any algorithm)
    server        rank 0 has the whole in one piece: the ranks of its node have written      (window)
                  their shards into its memory. It clips and updates, and has all state
    across        the ranks with local rank l broadcast shard l of the new parameters        (any algorithm)
    node          which arrive in the one copy that the node has                             (window)

Cost of a step, n numbers, N nodes of L ranks: a node sends n and receives n, n/L through each of its ranks, where
without the window each of its ranks sends n and receives n. The server's node receives n (N-1) and sends n (N-1), or as
a chain (algorithm ring) n each way. Rounding: the ranks of a node are added in rank order and divided by L; then as the
algorithm between the nodes says. A 16-bit wire is rounded when packed, and once more when it leaves the node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..chunks import whole_at
from ..collectives.halves import gather_chunks_async, reduce_chunks_async
from ..gradients.bucket import Bucket
from ..native.dtypes import HALVES
from ..runtime.group import Group
from ..runtime.handle import Handle
from ..window.area import NOWHERE, Place
from .flat import memory_of_rank_0
from .holders import Levels
from .owners import SERVER
from .pushes import Pushes


class ServerPushes(Pushes):
    """The pushes of ps. Rank 0, the server, is local rank 0 of the first node."""

    EVERY_NODE_UPDATES = False
    KIND = "reduce_scatter"

    def __init__(self, group: Group, levels: Levels, algorithm: str):
        super().__init__(group, levels, algorithm)
        self._sums: list[torch.Tensor] = []
        """On the server's node, of each bucket: memory of rank 0 for the mean over all ranks. fp32 where the bucket has
        16 bits, else rank 0's bucket itself."""

    @property
    def _at_server(self) -> bool:
        return self.across.rank == SERVER

    def targets(self, buckets: Sequence[Bucket], firsts: Sequence[Place]) -> list[torch.Tensor | None]:
        self._sums, self.memory = [], []
        found: list[torch.Tensor | None] = []
        for bucket, first, chunks in zip(buckets, firsts, self.chunks, strict=True):
            into = bucket.flat
            if self._at_server:
                self._sums.append(self._sum_of(bucket, first))
                if bucket.dtype not in HALVES:
                    into = self._sums[-1]  # the shard arrives where rank 0 wants it
            own = chunks[self.node.rank]
            found.append(into[own.start : own.stop])
        return found

    def _sum_of(self, bucket: Bucket, first: Place) -> torch.Tensor:
        """Memory of rank 0 for the mean of ``bucket``, of which rank 0 has its own numbers at ``first``."""
        if bucket.dtype in HALVES:
            found = memory_of_rank_0(self.node, bucket.numel, torch.float32)
            if self.node.rank == 0:
                self.memory.append(found)
            return found
        window = self.node.window
        assert window is not None
        if self.node.rank == 0 or first.segment == NOWHERE:  # which has no numbers
            return bucket.flat
        return window.view(0, first, bucket.numel * bucket.dtype.itemsize).view(bucket.dtype).data

    def exchange(self, shard: torch.Tensor, bucket: Bucket) -> Handle:
        chunks = whole_at(SERVER, shard.numel(), self.across.size)
        return reduce_chunks_async(shard, chunks, "mean", bucket.name, self.algorithm, group=self.across)

    def arrived(self, bucket: Bucket, shard: torch.Tensor) -> None:
        if self._at_server and bucket.dtype in HALVES:
            own = self.chunks[bucket.index][self.node.rank]
            self._sums[bucket.index][own.start : own.stop].copy_(shard)
        self.count()

    def owned(self, bucket: Bucket, shard: torch.Tensor) -> torch.Tensor:
        return self._sums[bucket.index] if self._at_server else shard

    def pull(self, hosts: Sequence[torch.Tensor]) -> None:
        if self._at_server:
            self.node.barrier()  # rank 0 has updated
        pulls = []
        for index, (host, chunks) in enumerate(zip(hosts, self.chunks, strict=True)):
            own = chunks[self.node.rank]
            if own.numel:
                mine, parts = host[own.start : own.stop], whole_at(SERVER, own.numel, self.across.size)
                name = f"parameters of bucket {index}"
                pulls.append(gather_chunks_async(mine, parts, name, self.algorithm, group=self.across))
        for pull in pulls:
            pull.wait()
        self.count()
        super().pull(hosts)
