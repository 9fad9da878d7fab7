"""Benchmarks of the KV block manager."""
