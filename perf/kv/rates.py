"""GB/s of the disk tier and of the object tier, each beside what the same medium gives without it."""

from __future__ import annotations

from collections.abc import Iterator

from perf.kv.disk_rates import NUM_THREADS, OTHER_MEMORY, SAME_MEMORY
from perf.kv.model import block_bytes, model_folder
from perf.kv.object_rates import NUM_THREADS as BOTO_THREADS
from perf.kv.object_rates import TIER, limit_name
from perf.kv.served_tiers import GROUP_BLOCKS
from perf.kv.store import NAME, Store
from perf.kv.subprocesses import measure
from perf.kv.tier_messages import TierRates, TierSpec
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Pair, median, paired_ratio

LIMITS: dict[str, tuple[str, ...]] = {
    "g3_read": (SAME_MEMORY, OTHER_MEMORY),
    "g3_write": (SAME_MEMORY,),
    "g4_read": tuple(limit_name(threads) for threads in BOTO_THREADS),
    "g4_write": tuple(limit_name(threads) for threads in BOTO_THREADS),
}
_BARS = {"g3_read": 0.8}
"""Against every limit: the gentler one reads into the same pages as the tier, and so hides what those cost."""
_DESCRIBED = {
    SAME_MEMORY: f"{NUM_THREADS} threads, O_DIRECT, arena's memory",
    OTHER_MEMORY: f"{NUM_THREADS} threads, O_DIRECT, anonymous memory",
}
_NUM_BLOCKS = 512
_NUM_GROUPS = 32
_NUM_ROUNDS = 6
_NUM_ROUNDS_LONG = 15
_TIMEOUT_S = 600.0
_TIMEOUT_LONG_S = 1200.0

REQUIRED = tuple(
    RequiredRow(case, f"gbps/{limit}", "GB/s", needs_reference=True)
    for case, limits in LIMITS.items()
    for limit in limits
)


def measurements(found: TierRates) -> Iterator[Measurement]:
    """All rows."""
    for case, limits in LIMITS.items():
        ours = found.rates.get(case, {}).get(TIER, [])
        for limit in limits:
            theirs = found.rates.get(case, {}).get(limit, [])
            if not ours or not theirs:
                trouble = found.troubles.get(case, "nothing was measured")
                yield Measurement(case, f"gbps/{limit}", "GB/s", None, trouble=trouble)
                continue
            pairs = [Pair(value, reference) for value, reference in zip(ours, theirs, strict=True)]
            ratio = paired_ratio(pairs, is_lower_better=False)
            reference = _DESCRIBED.get(limit, f"{limit} on {NAME}")
            comparison = Comparison(reference, median(theirs), ratio, _BARS.get(case))
            yield Measurement(case, f"gbps/{limit}", "GB/s", median(ours), comparison)


def run(reporter: Reporter, store: Store | None, is_long: bool) -> None:
    """Measure and report.

    Raises:
        BenchError: The measuring process failed.
    """
    spec = TierSpec(
        block_bytes=block_bytes(model_folder()),
        num_blocks=_NUM_BLOCKS,
        group_blocks=GROUP_BLOCKS,
        num_groups=_NUM_GROUPS,
        num_rounds=_NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS,
        endpoint=store.endpoint if store is not None else "",
        bucket=store.make_bucket("kelp-rates") if store is not None else "",
    )
    environment = store.environment if store is not None else {}
    timeout_s = _TIMEOUT_LONG_S if is_long else _TIMEOUT_S
    found = TierRates.from_json(measure("perf.kv.tier_process", spec, environment, timeout_s))
    for measurement in measurements(found):
        reporter.add(measurement)
