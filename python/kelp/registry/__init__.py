"""Who serves what, where, and whether it is alive."""
