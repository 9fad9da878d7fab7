"""A worker: one executor serving prefill, decode or both, to routers and to other workers."""
