"""A server: it owns a shard of the parameters and updates the shard with what workers push.

    loop             moves messages between a transport and the state machine
    server           the state machine: a message in, messages out; it owns a ledger, reads, and one synchronization
    framed           frames: many small pushes or pulls in one message
    bsp              synchronization under BSP: rounds become updates, and servers agree on the norm
    rounds           BSP's sums: one slot per worker, added in rank order
    immediate        synchronization under SSP and ASP: each push is an update of its own
    synchronization  what the server asks of either
    reads            who may read now, and who waits
    ledger           what the server knows of its workers, its answers, and what it refuses
    shard            the values and the optimizer

Each file uses only files below it.
"""
