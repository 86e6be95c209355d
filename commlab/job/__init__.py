"""The job that this process is one rank of, and the machine it runs on.

``launch`` reads which rank the launcher made this process, and ends all ranks when one fails; ``presence`` knows which
ranks have come, ``watch`` who has left, ``leaving`` how; ``topology`` groups ranks into nodes; ``machine`` measures
memory and network traffic, ``limits`` is what a container may use; ``cache`` is where things are kept between jobs.
Nothing here knows torch, MPI, or a group of ranks.
"""
