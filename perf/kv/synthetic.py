"""Onboarding KV as large as an 8B model's, without a model: seconds per tier, and what they are worth.

There is nothing to recompute with here, so the reference is computing at a stated rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from perf.kv.break_even import SHORT_LENGTHS, break_even
from perf.kv.store import Store
from perf.kv.subprocesses import measure
from perf.kv.synthetic_messages import SyntheticResult, SyntheticSpec
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import MIN_PAIRS, Pair, median, paired_ratio

LENGTHS = (512, 2048, 7680)
MEASURED = (*SHORT_LENGTHS, *LENGTHS)
TIERS = ("g2", "g3", "g4")
PREFILL_TOKENS_PER_S = 10_000
"""Stated, not measured: about what an 8B model makes of one large accelerator."""

BREAK_EVEN = "break_even_8b"
G2_CASES = ("g2_read", "g2_write")
MEMCPY = "gbps/memcpy"

_RECOMPUTED = f"n / {PREFILL_TOKENS_PER_S} tokens/s"
_UNIT = f"tokens at {PREFILL_TOKENS_PER_S}/s"
_NUM_ROUNDS = 5
_NUM_ROUNDS_LONG = 15
_TIMEOUT_S = 600.0
_TIMEOUT_LONG_S = 1200.0


def case_name(length: int) -> str:
    """Such as `onboard_8b_2048`."""
    return f"onboard_8b_{length}"


def metric_name(tier: str) -> str:
    """Such as `seconds_g2/recompute`."""
    return f"seconds_{tier}/recompute"


REQUIRED = (
    *(RequiredRow(case_name(length), metric_name(tier), "s", True) for length in LENGTHS for tier in TIERS),
    *(RequiredRow(BREAK_EVEN, f"tokens_{tier}", _UNIT) for tier in TIERS),
    *(RequiredRow(case, MEMCPY, "GB/s", True) for case in G2_CASES),
)


def measurements(result: SyntheticResult) -> Iterator[Measurement]:
    """All rows."""
    for length in LENGTHS:
        for tier in TIERS:
            yield _row(length, tier, result.onboard.get(tier, {}).get(str(length), []), result.trouble)
    for tier in TIERS:
        yield _break_even_row(tier, result)
    yield from _rate_rows(result)


def _row(length: int, tier: str, seconds: Sequence[float], trouble: str) -> Measurement:
    case, metric = case_name(length), metric_name(tier)
    if len(seconds) < MIN_PAIRS:
        return Measurement(case, metric, "s", None, trouble=trouble or f"{len(seconds)} samples are too few")
    computed_s = length / PREFILL_TOKENS_PER_S
    ratio = paired_ratio([Pair(value, computed_s) for value in seconds], is_lower_better=True)
    return Measurement(case, metric, "s", median(seconds), Comparison(_RECOMPUTED, computed_s, ratio))


def _break_even_row(tier: str, result: SyntheticResult) -> Measurement:
    columns = {length: result.onboard.get(tier, {}).get(str(length), []) for length in MEASURED}
    if not all(columns.values()):
        trouble = result.trouble or "not all lengths were measured"
        return Measurement(BREAK_EVEN, f"tokens_{tier}", _UNIT, None, trouble=trouble)
    bring = {length: median(seconds) for length, seconds in columns.items()}
    found = break_even(bring, {length: length / PREFILL_TOKENS_PER_S for length in MEASURED})
    return Measurement(BREAK_EVEN, f"tokens_{tier}", found.unit(_UNIT), found.tokens)


def _rate_rows(result: SyntheticResult) -> Iterator[Measurement]:
    for case, found in zip(G2_CASES, (result.g2_read, result.g2_write), strict=True):
        pairs = [Pair(value, reference) for value, reference in found]
        if not pairs:
            yield Measurement(case, MEMCPY, "GB/s", None, trouble=result.trouble or "nothing was measured")
            continue
        limit = median([pair.reference for pair in pairs])
        comparison = Comparison("numpy, one thread", limit, paired_ratio(pairs, is_lower_better=False))
        yield Measurement(case, MEMCPY, "GB/s", median([pair.value for pair in pairs]), comparison)


def run(reporter: Reporter, store: Store | None, is_long: bool) -> None:
    """Measure and report; without a store no G4.

    Raises:
        BenchError: The measuring process failed.
    """
    num_rounds = _NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS
    spec, environment = SyntheticSpec(MEASURED, num_rounds), {}
    if store is not None:
        spec = SyntheticSpec(MEASURED, num_rounds, store.endpoint, store.make_bucket("kelp-synthetic"))
        environment = store.environment
    timeout_s = _TIMEOUT_LONG_S if is_long else _TIMEOUT_S
    result = SyntheticResult.from_json(measure("perf.kv.synthetic_process", spec, environment, timeout_s))
    if result.trouble:
        reporter.say(f"(synthetic KV: {result.trouble})")
    elif store is None:
        result.trouble = "there is no object store"
    for measurement in measurements(result):
        reporter.add(measurement)
