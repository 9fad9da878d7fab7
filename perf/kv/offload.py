"""What write-through offload costs those who decode.

The same load goes to a server that offloads to host and disk, and to one that has no block manager, in turn. Each round
has fresh prompts, so that blocks are sealed, READ, checked and written while the streams decode.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from perf.kv.asking import Asker
from perf.kv.model import block_bytes, model_folder
from perf.kv.served_tiers import arena_folder, common_settings, options_of, wait_joined
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RequiredRow
from perf.serving import deployment
from perf.serving.deployment import Deployment, Variant
from perf.serving.figures import figures_of
from perf.serving.load import LoadSpec, run_load
from perf.serving.prompts import make_prompts
from perf.stats import Pair, median, paired_ratio
from perf.suite import BenchError

CASE = "offload_cost"
REFERENCE = "the same load without block manager"
NUM_STREAMS = 8
INPUT_TOKENS = 128
OUTPUT_TOKENS = 192

_MAX_P50, _MAX_P99 = 1.05, 1.10
"""Times as slow as without; the second binds only what the interval does not exclude."""
METRICS = ("itl_p50", "itl_p99")
_STORED_SHARE = "stored_share"
_NUM_ROUNDS = 24
_NUM_ROUNDS_LONG = 30
_THREADS = 2
_TIMEOUT_S = 120.0
_ARENA_BLOCKS, _DISK_BLOCKS = 2048, 4096
_WRITTEN = 'kelp_kv_tier_moved_bytes_total{direction="write",tier="host"}'

REQUIRED = (
    *(RequiredRow(CASE, f"{metric}/off", "ms", needs_reference=True) for metric in METRICS),
    RequiredRow(CASE, _STORED_SHARE, "of 1"),
)


@dataclass(frozen=True, slots=True)
class Round:
    """ITL figures in ms, by metric, of one load with offload and of the same one without."""

    on: dict[str, float]
    off: dict[str, float]


def measurements(rounds: Sequence[Round], stored_share: float) -> Iterator[Measurement]:
    """All rows.

    Args:
        rounds: At least five.
        stored_share: Bytes that the manager took, over those of the blocks that the loads filled.
    """
    for metric in METRICS:
        pairs = [Pair(one.on[metric], one.off[metric]) for one in rounds]
        ratio = paired_ratio(pairs, is_lower_better=True)
        is_p99 = metric == "itl_p99"
        bar = 1 / (_MAX_P99 if is_p99 else _MAX_P50)
        comparison = Comparison(
            REFERENCE, median([pair.reference for pair in pairs]), ratio, bar, is_bar_for_best=is_p99
        )
        yield Measurement(CASE, f"{metric}/off", "ms", median([pair.value for pair in pairs]), comparison)
    yield Measurement(CASE, _STORED_SHARE, "of 1", stored_share)


class _Contest:
    """Two servers that get the same load in turn."""

    def __init__(self, on: Deployment, off: Deployment, seed: int) -> None:
        self._on, self._off = on, off
        self._seed = seed

    def round(self, number: int) -> Round:
        """One load on both; who is first alternates.

        Raises:
            BenchError: A request failed.
        """
        prompts = make_prompts(NUM_STREAMS, INPUT_TOKENS, seed=self._seed + number)
        order = (self._on, self._off) if number % 2 else (self._off, self._on)
        found = {served.grpc_endpoint: self._load(served, prompts) for served in order}
        return Round(found[self._on.grpc_endpoint], found[self._off.grpc_endpoint])

    def _load(self, served: Deployment, prompts: tuple[str, ...]) -> dict[str, float]:
        spec = LoadSpec(served.grpc_endpoint, prompts, OUTPUT_TOKENS, NUM_STREAMS, _TIMEOUT_S)
        answers = run_load(spec).answers
        if failed := [answer.error for answer in answers if answer.error]:
            raise BenchError(f"{len(failed)} of {len(answers)} requests failed: {failed[0][:200]}")
        return figures_of([answers])


def _start(stack: ExitStack, work: Path, num_block_bytes: int) -> tuple[Deployment, Deployment]:
    common = common_settings(_THREADS)
    tiers = {
        **common,
        "kv_manager.arena_folder": arena_folder("offload", work),
        "kv_manager.host_bytes": _ARENA_BLOCKS * num_block_bytes,
        "disk_tier.path": work / "disk",
        "disk_tier.max_bytes": _DISK_BLOCKS * num_block_bytes,
    }
    off = {**common, "kv_manager.enabled": "false"}
    return (
        stack.enter_context(deployment.running("aggregated", work, Variant("on", options_of(tiers)))),
        stack.enter_context(deployment.running("aggregated", work, Variant("off", options_of(off)))),
    )


def _play(contest: _Contest, num_rounds: int, asker: Asker, num_block_bytes: int) -> tuple[list[Round], float]:
    contest.round(-1)
    before = asker.manager_stats().get(_WRITTEN, 0.0)
    rounds = [contest.round(number) for number in range(num_rounds)]
    filled = num_rounds * NUM_STREAMS * ((INPUT_TOKENS + OUTPUT_TOKENS) // 16) * num_block_bytes
    return rounds, (asker.manager_stats().get(_WRITTEN, 0.0) - before) / filled


def run(reporter: Reporter, is_long: bool) -> None:
    """Measure and report.

    Raises:
        BenchError: A server does not come up, or a request failed.
    """
    started_s, num_block_bytes = time.monotonic(), block_bytes(model_folder())
    num_rounds = _NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="kelp-bench-", ignore_cleanup_errors=True)
        on, off = _start(stack, Path(stack.enter_context(folder)), num_block_bytes)
        asker = stack.enter_context(Asker(on.grpc_endpoint))
        wait_joined(asker, 1)
        contest = _Contest(on, off, seed=time.time_ns() % 2**32)
        rounds, stored_share = _play(contest, num_rounds, asker, num_block_bytes)
    reporter.say(f"(offload: {num_rounds} rounds in {time.monotonic() - started_s:.0f} s)")
    for measurement in measurements(rounds, stored_share):
        reporter.add(measurement)
