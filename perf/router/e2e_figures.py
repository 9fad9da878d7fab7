"""What a load's answers add up to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perf.router.loadgen import LoadResult
from perf.stats import percentile
from perf.suite import BenchError


@dataclass(frozen=True, slots=True)
class Figures:
    """One load on one server.

    Attributes:
        cpu_per_request_us: Of the server's processes together.
        events_per_request: SSE events; the fewer, the more tokens share one.
    """

    requests_per_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    cpu_per_request_us: float
    client_cpu_per_request_us: float
    events_per_request: float


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that is reported."""

    name: str
    unit: str
    is_lower_better: bool
    of: Callable[[Figures], float]


METRICS = (
    Metric("ttft_p50", "ms", True, lambda figures: figures.ttft_p50_ms),
    Metric("ttft_p99", "ms", True, lambda figures: figures.ttft_p99_ms),
    Metric("tokens_per_s", "tokens/s", False, lambda figures: figures.tokens_per_s),
    Metric("requests_per_s", "requests/s", False, lambda figures: figures.requests_per_s),
    Metric("cpu_per_request", "us", True, lambda figures: figures.cpu_per_request_us),
    Metric("client_cpu_per_request", "us", True, lambda figures: figures.client_cpu_per_request_us),
    Metric("events_per_request", "", True, lambda figures: figures.events_per_request),
)


def figures_of(result: LoadResult, server_cpu_s: float) -> Figures:
    """Sum up one load.

    Args:
        result: What the load generator saw.
        server_cpu_s: What the server's processes used meanwhile.

    Raises:
        BenchError: A request failed, so the figures would flatter the server.
    """
    failed = [answer for answer in result.answers if answer.error]
    if failed or not result.answers:
        reason = failed[0].error if failed else "nothing was sent"
        raise BenchError(f"{len(failed)} of {len(result.answers)} requests failed: {reason}")
    count = len(result.answers)
    ttft_ms = [(answer.first_s - answer.start_s) * 1e3 for answer in result.answers]
    return Figures(
        requests_per_s=count / result.wall_s,
        tokens_per_s=sum(answer.num_output_tokens for answer in result.answers) / result.wall_s,
        ttft_p50_ms=percentile(ttft_ms, 0.5),
        ttft_p99_ms=percentile(ttft_ms, 0.99),
        cpu_per_request_us=server_cpu_s / count * 1e6,
        client_cpu_per_request_us=result.client_cpu_s / count * 1e6,
        events_per_request=sum(answer.num_events for answer in result.answers) / count,
    )
