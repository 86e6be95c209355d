"""Horovod's API on commlab: ``import commlab.horovod.torch as hvd``, and ``python -m commlab.horovod SCRIPT`` for
programs that can't be changed."""
