"""From answers to figures: TTFT, ITL, tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perf.serving.load import Answer
from perf.stats import percentile


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that every cell of the suite reports."""

    name: str
    unit: str
    is_lower_better: bool


METRICS = (
    Metric("ttft_p50", "ms", True),
    Metric("ttft_p99", "ms", True),
    Metric("itl_p50", "ms", True),
    Metric("itl_p99", "ms", True),
    Metric("tokens_per_s", "tokens/s", False),
)


def ttfts_s(answers: Sequence[Answer]) -> list[float]:
    """From sending a request to the response with its first token."""
    return [answer.arrivals[0][0] - answer.start_s for answer in answers if answer.arrivals]


def itls_s(answers: Sequence[Answer]) -> list[float]:
    """One gap per token after the first response.

    A response with several tokens spreads the time since the one before evenly over them: it says that the tokens
    came at this pace, not that all but one took no time.
    """
    gaps: list[float] = []
    for answer in answers:
        for (before_s, _), (now_s, tokens) in zip(answer.arrivals, answer.arrivals[1:], strict=False):
            gaps.extend([(now_s - before_s) / tokens] * tokens)
    return gaps


def span_s(answers: Sequence[Answer]) -> float:
    """From the first request sent to the last token received."""
    return max(answer.arrivals[-1][0] for answer in answers) - min(answer.start_s for answer in answers)


def figures_of(rounds: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Every metric over one or more rounds, answers pooled; answers without a token are left out.

    Returns:
        Value by metric name; empty if there is nothing to compute from.
    """
    good_rounds = [[answer for answer in answers if answer.arrivals] for answers in rounds]
    pooled = [answer for answers in good_rounds for answer in answers]
    gaps = itls_s(pooled)
    if not pooled or not gaps:
        return {}
    ttfts = ttfts_s(pooled)
    seconds = sum(span_s(answers) for answers in good_rounds if answers)
    return {
        "ttft_p50": percentile(ttfts, 0.50) * 1e3,
        "ttft_p99": percentile(ttfts, 0.99) * 1e3,
        "itl_p50": percentile(gaps, 0.50) * 1e3,
        "itl_p99": percentile(gaps, 0.99) * 1e3,
        "tokens_per_s": sum(answer.num_tokens for answer in pooled) / seconds,
    }
