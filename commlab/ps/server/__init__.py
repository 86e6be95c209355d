"""A server: it owns a shard of the parameters and updates them."""
