"""Benchmarks: `python -m perf.run SUITE` from the repository root; see docs/benchmarks.md."""
