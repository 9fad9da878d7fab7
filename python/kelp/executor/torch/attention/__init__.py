"""Attention over the paged KV pool: one contract (`base`), one module per way of computing it."""
