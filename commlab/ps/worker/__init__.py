"""A worker's side of the parameter server.

    requests    keys and flat tensors become messages: push, pull, the end of a clock
    outgoing    what waits to leave in a frame
    client      the links to the servers: requests go out, answers end the calls and their handles
    calls       a call under way: its requests, their answers, its handle
    keys        which tensors the keys name, the same on all ranks

Each file uses only files below it.
"""
