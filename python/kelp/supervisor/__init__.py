"""Prepares a machine and supervises the tritonservers that serve on it."""
