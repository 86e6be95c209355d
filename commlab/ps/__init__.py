"""The parameter server: workers push gradients to servers, which own the parameters, and pull values from them.

    store           ParameterServer, one object on every rank
    worker/         what a worker asks, and the answers
    server/         what a server does with a request
    ending          a store's end, whoever ends it
    plan            a store's arguments, checked before anything is sent
    link            messages to and from one peer, over any transport
    frames          many small tensors in one message
    messages        headers, sizes and limits
    placement       which server owns which slices of which tensors
    consistency     when a worker may read: BSP, SSP, ASP
    hypers          hyper-parameters on their way to servers
    encoding        an optimizer's state as bytes
    elementwise     which optimizers servers can run

A push goes through store, worker/requests, worker/client and link to the server's link, then through server/loop,
server/server and server/bsp (with server/rounds) or server/immediate to server/shard.
"""
