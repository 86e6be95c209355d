"""The job that this process is one rank of, and the machine it runs on.

``launch`` reads which rank the launcher made this process, and ends all ranks when one fails; ``topology`` groups ranks
into nodes; ``machine`` measures memory and network traffic; ``cache`` is where things are kept between jobs. Nothing
here knows torch, MPI, or a group of ranks.
"""
