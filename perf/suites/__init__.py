"""The suites that exist."""

from __future__ import annotations

from perf.suite import Suite
from perf.suites import executor, gpu, kv, resilience, router, serve, sim

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (serve.SUITE, executor.SUITE, gpu.SUITE, sim.SUITE, router.SUITE, kv.SUITE, resilience.SUITE)
}
