"""The cases of the suite: which workload, how many workers, how large their caches, and how fast requests come.

The rate follows one rule, so that no case is tuned by hand: `LOAD` of what the fleet could serve if routing reached the
pooled hit bound and every worker decoded `REFERENCE_BATCH` sequences at a time. That is computed from the timing model
and the first half of the workload, never from a policy's results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from kelp.sim.bound import pooled_hits
from kelp.sim.fleet import FleetSpec
from kelp.sim.pacing import at_rate, halves
from kelp.sim.report import SLA
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.sessions import make_sessions
from kelp.sim.traces import CONVERSATION_STEP_S, read_trace
from kelp.timing.model import TimingModel
from perf.machine import REPOSITORY
from perf.suite import BenchError

TRACES = REPOSITORY.parent / "shared" / "data" / "traces"
CONVERSATION = "mooncake_conversation"
SYNTHETIC = "mooncake_synthetic"
SESSIONS = "sessions"

LOAD = 0.9
REFERENCE_BATCH = 32
TARGETS = SLA(ttft_s=5.0, itl_s=0.2)
"""A step with a full budget of 4,096 prompt tokens takes 0.2 s; who meets more than one of them must have tokens to
spread them over."""

TUNING_SEED = 0
REPORT_SEEDS = (11, 12, 13)
REPORT_SEEDS_LONG = (11, 12, 13, 14, 15, 16, 17, 18)

_NUM_SESSION_REQUESTS = 8000
_SESSION_BLOCK_SIZE = 128
_SPREADS_S = {CONVERSATION: CONVERSATION_STEP_S}


@dataclass(frozen=True, slots=True)
class Case:
    """One row group.

    Attributes:
        cache: Name of the cache size.
        cache_tokens: KV tokens per worker.
    """

    workload: str
    num_workers: int
    cache: str
    cache_tokens: int

    @property
    def name(self) -> str:
        """As rows spell it."""
        return f"{self.workload}_w{self.num_workers}_{self.cache}"

    def fleet(self, workload: Workload) -> FleetSpec:
        """Its workers."""
        return FleetSpec(num_workers=self.num_workers, num_blocks=self.cache_tokens // workload.block_size)


_SMALL, _MEDIUM = "small", "medium"
_CACHE_TOKENS = {
    CONVERSATION: {_SMALL: 512 * 1024, _MEDIUM: 1536 * 1024},
    SYNTHETIC: {_SMALL: 512 * 1024, _MEDIUM: 1536 * 1024},
    SESSIONS: {_SMALL: 256 * 1024, _MEDIUM: 768 * 1024},
}
"""Around the knees of the traces' LRU curves: 1,024 and 3,072 of Mooncake's blocks per worker."""

_SIZES = ((4, _MEDIUM), (8, _SMALL), (8, _MEDIUM), (16, _MEDIUM))

CASES = tuple(
    Case(workload, num_workers, cache, tokens[cache])
    for workload, tokens in _CACHE_TOKENS.items()
    for num_workers, cache in _SIZES
)


def case_named(name: str) -> Case:
    """A case by its name.

    Raises:
        BenchError: There is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    raise BenchError(f"{name}: no such case; there are {', '.join(case.name for case in CASES)}")


def trace_path(workload: str) -> Path:
    """Where a trace lies."""
    return TRACES / f"{workload}.jsonl.gz"


def trouble_of(workload: str) -> str:
    """Why a workload can't be had; empty if it can."""
    if workload == SESSIONS or trace_path(workload).is_file():
        return ""
    return f"{trace_path(workload)}: the trace is not there"


@lru_cache(maxsize=8)
def _whole(workload: str, seed: int) -> Workload:
    if workload == SESSIONS:
        return make_sessions(_NUM_SESSION_REQUESTS, 1.0, seed, block_size=_SESSION_BLOCK_SIZE)
    return read_trace(trace_path(workload), _SPREADS_S.get(workload, 0.0), seed)


@cache
def rate_of(case: Case) -> float:
    """Requests/s of a case; see the module docstring."""
    first, _ = halves(_whole(case.workload, TUNING_SEED))
    fleet = case.fleet(first)
    hits = pooled_hits(first, fleet.size * fleet.num_blocks).tolist()
    timing = fleet.timing
    seconds = sum(_service_s(timing, request, cached) for request, cached in zip(first.requests, hits, strict=True))
    return LOAD * case.num_workers * len(first.requests) / seconds


def _service_s(timing: TimingModel, request: SimRequest, num_cached: int) -> float:
    """A worker's time that a request takes, as its share of the steps."""
    num_new = request.num_prompt_tokens - num_cached
    prefill_s = timing.prefill_s(num_new, num_cached) - timing.step_s
    context = request.num_prompt_tokens + request.num_output_tokens // 2
    token_s = timing.step_s / REFERENCE_BATCH + timing.decode_sequence_s + context * timing.decode_context_s
    return prefill_s + request.num_output_tokens * token_s


def workload_of(case: Case, seed: int, is_tuning: bool) -> Workload:
    """First half of the workload for tuning, second for reporting, at the case's rate, caches cold.

    A trace's requests are the same for all seeds (the conversation trace's arrivals are spread by the seed); sessions
    are drawn anew.
    """
    first, second = halves(_whole(case.workload, seed))
    return at_rate(first if is_tuning else second, rate_of(case))
