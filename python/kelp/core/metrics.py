"""Counters and histograms, collected in memory and exported elsewhere.

Triton's Metric objects crash the server when two threads touch one, and each call is a round trip between
processes. So code here only adds to numbers under a lock; `kelp_triton.metrics` flushes the differences from
one thread.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class MetricFamily:
    """A metric's name, kind and help text; `buckets` (upper bounds) for histograms. There is one object for each."""

    name: str
    kind: str
    help: str
    buckets: tuple[float, ...] = ()


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

REQUESTS = MetricFamily("kelp_requests_total", "counter", "Requests ended, by outcome")
VERSION_REQUESTS = MetricFamily(
    "kelp_version_requests_total", "counter", "Requests that another version than the router's own served"
)
TTFT = MetricFamily("kelp_ttft_seconds", "histogram", "Arrival to first token sent", _SECONDS)
ITL = MetricFamily("kelp_itl_seconds", "histogram", "Mean time between tokens of a request", _SECONDS)
PHASE = MetricFamily("kelp_phase_seconds", "histogram", "Time of one phase of a request", _SECONDS)
OUTPUT_TOKENS = MetricFamily("kelp_output_tokens_total", "counter", "Tokens generated")
PROMPT_TOKENS = MetricFamily("kelp_prompt_tokens_total", "counter", "Prompt tokens received")
CACHED_TOKENS = MetricFamily("kelp_cached_tokens_total", "counter", "Prompt tokens not recomputed")
RESPONSES = MetricFamily("kelp_responses_total", "counter", "Responses sent, one or more tokens each")
RETRIES = MetricFamily("kelp_retries_total", "counter", "Attempts moved to another worker")
TRANSFERRED_BLOCKS = MetricFamily("kelp_transferred_blocks_total", "counter", "KV blocks read from prefill workers")
DRAFT_TOKENS = MetricFamily("kelp_draft_tokens_total", "counter", "Guessed tokens that a worker verified")
ACCEPTED_TOKENS = MetricFamily("kelp_accepted_tokens_total", "counter", "Guessed tokens that were right")
BLOCKS = MetricFamily("kelp_kv_blocks", "gauge", "KV blocks of a worker by state")
LEASES = MetricFamily("kelp_handoff_leases", "gauge", "Prefilled sequences waiting to be read")
RUNNING = MetricFamily("kelp_running_sequences", "gauge", "Sequences in the engine by state")
DECISIONS = MetricFamily("kelp_routing_decisions_total", "counter", "Requests placed, by policy and way")
PROMPT_BLOCKS = MetricFamily("kelp_routing_prompt_blocks_total", "counter", "Full prompt blocks of placed requests")
PREDICTED_BLOCKS = MetricFamily(
    "kelp_routing_overlap_blocks_total", "counter", "Of those, leading ones that the index saw on the chosen worker"
)
PREDICTED_TIER_BLOCKS = MetricFamily(
    "kelp_routing_lower_tier_blocks_total", "counter",
    "Prompt blocks that the router expected the chosen worker to bring from a lower tier, by tier",
)  # fmt: skip
ONBOARDED_TIER_BLOCKS = MetricFamily(
    "kelp_routing_onboarded_blocks_total", "counter", "Prompt blocks that workers did bring from a lower tier, by tier"
)
TTFT_RATIO = MetricFamily(
    "kelp_routing_ttft_ratio", "histogram", "Reservation to first token: measured over predicted",
    (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.11, 1.25, 1.5, 2.0, 4.0, 10.0),
)  # fmt: skip
QUEUE_LENGTH = MetricFamily("kelp_router_queue_requests", "gauge", "Requests waiting in the router's queue")
QUEUE_WAIT = MetricFamily("kelp_router_queue_seconds", "histogram", "Time in the router's queue", _SECONDS)
STALE_ROUTERS = MetricFamily("kelp_routers_stale", "gauge", "Other routers whose requests are not known well enough")
KNOWN_ROUTERS = MetricFamily("kelp_routers_known", "gauge", "Other routers of the same workers")
INDEX_BYTES = MetricFamily("kelp_index_bytes", "gauge", "Estimated memory of the prefix index")
APPROXIMATE_WORKERS = MetricFamily("kelp_approximate_workers", "gauge", "Workers whose blocks are partly guessed")
KV_EVENT_BLOCKS = MetricFamily("kelp_kv_event_blocks_total", "counter", "Blocks that workers reported, by kind")
KV_EVENT_DROPPED = MetricFamily("kelp_kv_event_dropped_total", "counter", "KV events not used, by reason")
KV_EVENT_RECOVERIES = MetricFamily(
    "kelp_kv_event_recoveries_total", "counter", "Gaps, drifts and restarts in KV events, and what was asked for them"
)
KV_EVENT_WORKERS = MetricFamily("kelp_kv_event_workers", "gauge", "Workers by how far the KV index knows them")
KV_EVENT_MANAGERS = MetricFamily(
    "kelp_kv_event_managers", "gauge", "KV block managers by how far the KV index knows them"
)
KV_TIER_BLOCKS = MetricFamily("kelp_kv_tier_blocks", "gauge", "Places for blocks of a lower tier, by state")
KV_TIER_BYTES = MetricFamily("kelp_kv_tier_bytes", "gauge", "Bytes of the blocks that a lower tier holds")
KV_TIER_HITS = MetricFamily("kelp_kv_tier_hits_total", "counter", "Blocks found for prompts, by tier")
KV_TIER_MISSES = MetricFamily("kelp_kv_tier_misses_total", "counter", "Blocks asked for that no tier has")
KV_TIER_REMOVED = MetricFamily("kelp_kv_tier_removed_total", "counter", "Blocks that left a tier, by reason")
KV_TIER_REFUSED = MetricFamily("kelp_kv_tier_refused_total", "counter", "Blocks that a tier did not take, by reason")
KV_TIER_CORRUPT = MetricFamily("kelp_kv_tier_corrupt_blocks_total", "counter", "Blocks found damaged or unreadable")
KV_TIER_MOVED = MetricFamily("kelp_kv_tier_moved_bytes_total", "counter", "Bytes read from and written to a tier")
KV_TIER_SECONDS = MetricFamily("kelp_kv_tier_seconds", "histogram", "Time of one call of a tier", _SECONDS)
KV_TIER_QUEUE = MetricFamily("kelp_kv_tier_queue_blocks", "gauge", "Blocks that wait to be read or written")
KV_TIER_EVENTS = MetricFamily("kelp_kv_tier_events_total", "counter", "What happened in a lower tier, by kind")
KV_STORE_STATE = MetricFamily("kelp_kv_object_store", "gauge", "Whether the object store is used, by state")
KV_STORE_BYTES = MetricFamily("kelp_kv_object_store_bytes", "gauge", "Bytes below the prefix at the last listing")
KV_MANAGER_OPERATIONS = MetricFamily("kelp_kv_manager_operations_total", "counter", "Operations of workers, by kind")
KV_MANAGER_REFUSED = MetricFamily("kelp_kv_manager_refused_total", "counter", "Operations refused, by error code")
KV_MANAGER_HELD = MetricFamily("kelp_kv_manager_held", "gauge", "Leases, pins, stores and workers that are known")
KV_MANAGER_JOINED = MetricFamily("kelp_worker_kv_manager", "gauge", "Whether a worker has a KV block manager, by state")
KV_MANAGER_FAILURES = MetricFamily(
    "kelp_worker_kv_manager_failures_total", "counter", "Times that a worker lost or could not join its manager"
)
OFFLOAD_BLOCKS = MetricFamily("kelp_offload_blocks_total", "counter", "Blocks offered to the manager, by outcome")
ONBOARD_REQUESTS = MetricFamily("kelp_onboard_requests_total", "counter", "Prompts asked for below, by outcome")
ONBOARD_BLOCKS = MetricFamily("kelp_onboard_blocks_total", "counter", "Blocks found below for prompts, by outcome")
ONBOARDED_BLOCKS = MetricFamily("kelp_onboarded_blocks_total", "counter", "Prompt blocks that came from lower tiers")
MODEL_RESTARTS = MetricFamily("kelp_model_restarts", "gauge", "How often the model was loaded again after its death")
FAMILIES = (
    MODEL_RESTARTS, REQUESTS, VERSION_REQUESTS, TTFT, ITL, PHASE, OUTPUT_TOKENS, PROMPT_TOKENS, CACHED_TOKENS,
    RESPONSES, RETRIES, TRANSFERRED_BLOCKS, DRAFT_TOKENS, ACCEPTED_TOKENS, BLOCKS, LEASES, RUNNING,
    DECISIONS, PROMPT_BLOCKS, PREDICTED_BLOCKS, PREDICTED_TIER_BLOCKS, ONBOARDED_TIER_BLOCKS, TTFT_RATIO,
    QUEUE_LENGTH, QUEUE_WAIT, STALE_ROUTERS, KNOWN_ROUTERS,
    INDEX_BYTES, APPROXIMATE_WORKERS,
    KV_EVENT_BLOCKS, KV_EVENT_DROPPED, KV_EVENT_RECOVERIES, KV_EVENT_WORKERS, KV_EVENT_MANAGERS,
    KV_TIER_BLOCKS, KV_TIER_BYTES, KV_TIER_HITS, KV_TIER_MISSES, KV_TIER_REMOVED, KV_TIER_REFUSED, KV_TIER_CORRUPT,
    KV_TIER_MOVED, KV_TIER_SECONDS, KV_TIER_QUEUE, KV_TIER_EVENTS, KV_STORE_STATE, KV_STORE_BYTES,
    KV_MANAGER_OPERATIONS, KV_MANAGER_REFUSED, KV_MANAGER_HELD, KV_MANAGER_JOINED, KV_MANAGER_FAILURES,
    OFFLOAD_BLOCKS, ONBOARD_REQUESTS, ONBOARD_BLOCKS, ONBOARDED_BLOCKS,
)  # fmt: skip


class Metrics:
    """Thread-safe accumulator of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[MetricFamily, Labels], float] = defaultdict(float)
        self._gauges: dict[tuple[MetricFamily, Labels], float] = {}
        self._observations: dict[tuple[MetricFamily, Labels], list[float]] = defaultdict(list)

    def add(self, family: MetricFamily, value: float = 1.0, **labels: str) -> None:
        """Increase a counter."""
        with self._lock:
            self._counters[family, _key_of(labels)] += value

    def set(self, family: MetricFamily, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[family, _key_of(labels)] = value

    def observe(self, family: MetricFamily, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        with self._lock:
            self._observations[family, _key_of(labels)].append(value)

    def take(
        self,
    ) -> tuple[
        dict[tuple[MetricFamily, Labels], float],
        dict[tuple[MetricFamily, Labels], float],
        dict[tuple[MetricFamily, Labels], list[float]],
    ]:
        """Counter increases and observations since the last call, and current gauges."""
        with self._lock:
            counters, self._counters = self._counters, defaultdict(float)
            observations, self._observations = self._observations, defaultdict(list)
            return dict(counters), dict(self._gauges), dict(observations)


def _key_of(labels: dict[str, str]) -> Labels:
    return tuple(sorted(labels.items())) if labels else ()
