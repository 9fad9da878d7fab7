"""What is said of a request at its end: the summary tensors of the last response, and the metrics."""

from __future__ import annotations

import numpy as np

from kelp.core.exchange import Tensors
from kelp.core.messages import RequestTimings, RequestUsage
from kelp.core.metrics import (
    CACHED_TOKENS,
    ITL,
    OUTPUT_TOKENS,
    PHASE,
    PROMPT_TOKENS,
    RESPONSES,
    TRANSFERRED_BLOCKS,
    TTFT,
    Metrics,
)
from kelp.router.job import Job

_NO_USAGE = RequestUsage()
_NO_TIMINGS = RequestTimings()


def _prefill_side(job: Job) -> tuple[RequestUsage, RequestTimings]:
    event = job.prefill_event or job.decode_event
    return (event.usage, event.timings) if event else (_NO_USAGE, _NO_TIMINGS)


def _decode_usage(job: Job) -> RequestUsage:
    event = job.decode_event or job.prefill_event
    return event.usage if event else _NO_USAGE


def summary_tensors(job: Job, num_output_tokens: int) -> Tensors:
    """Tensors of the last response alone; names from design §2."""
    prefill_usage, timings = _prefill_side(job)
    usage = _decode_usage(job)
    num_input_tokens = len(job.prompt.input_ids)
    int32 = {
        "sequence_length": num_input_tokens + num_output_tokens,
        "cached_tokens": prefill_usage.cached_tokens,
        "kv_cache_alloc_new_blocks": usage.new_blocks,
        "kv_cache_reused_blocks": usage.reused_blocks,
        "kv_cache_alloc_total_blocks": usage.new_blocks + usage.reused_blocks,
    }
    int64 = {
        "arrival_time_ns": job.arrival_ns,
        "first_scheduled_time_ns": timings.first_scheduled_ns,
        "first_token_time_ns": job.first_sent_ns,
        "last_token_time_ns": job.last_received_ns,
    }
    uint32 = {"num_input_tokens": num_input_tokens, "num_output_tokens": num_output_tokens}
    return {
        **{name: np.array([value], dtype=np.int32) for name, value in int32.items()},
        **{name: np.array([value], dtype=np.int64) for name, value in int64.items()},
        **{name: np.array([value], dtype=np.uint32) for name, value in uint32.items()},
        "worker_ids": np.array([worker_id.encode() for worker_id in job.worker_ids], dtype=np.object_),
    }


def observe(metrics: Metrics, job: Job, num_responses: int, now_ns: int) -> None:
    """Count a finished request and where its time went."""
    prefill_usage, _ = _prefill_side(job)
    num_tokens = len(job.generated)
    metrics.add(PROMPT_TOKENS, len(job.prompt.input_ids))
    metrics.add(OUTPUT_TOKENS, num_tokens)
    metrics.add(CACHED_TOKENS, prefill_usage.cached_tokens)
    metrics.add(RESPONSES, num_responses)
    metrics.add(TRANSFERRED_BLOCKS, _decode_usage(job).transferred_blocks)
    if job.first_sent_ns:
        metrics.observe(TTFT, (job.first_sent_ns - job.arrival_ns) / 1e9)
        if num_tokens > 1:
            metrics.observe(ITL, (now_ns - job.first_sent_ns) / 1e9 / (num_tokens - 1))
    for phase, seconds in phases(job).items():
        metrics.observe(PHASE, seconds, phase=phase)


def phases(job: Job) -> dict[str, float]:
    """Seconds per phase; times of different hosts are compared, so nothing is below zero.

    `queue`, `prefill` and `relay` add up to the TTFT; `transfer` (the part after prefill) and `first_step` lie
    between the first and the second token of a disaggregated request.
    """
    _, timings = _prefill_side(job)
    if not (timings.first_scheduled_ns and timings.prefill_done_ns and job.first_sent_ns):
        return {}
    ttft = job.first_sent_ns - job.arrival_ns
    queue = timings.first_scheduled_ns - timings.arrival_ns
    prefill = timings.prefill_done_ns - timings.first_scheduled_ns
    spans = {"queue": queue, "prefill": prefill, "relay": ttft - queue - prefill}
    if job.prefill_event is not None and job.decode_event is not None:
        decode = job.decode_event.timings
        if decode.transfer_done_ns and decode.first_token_ns:
            spans["transfer"] = decode.transfer_done_ns - timings.prefill_done_ns
            spans["first_step"] = decode.first_token_ns - decode.transfer_done_ns
    return {phase: max(0, span) / 1e9 for phase, span in spans.items()}
