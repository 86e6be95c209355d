"""Gradients on their way: ``parameters`` names what is trained, ``bucket`` plans what travels together, ``packer``
writes gradients as the wire has them, ``mirror`` brings buffers from a GPU and back, ``hooks`` watches backward and
lets buckets leave."""
