"""What is said of a request at its end: the summary tensors of the last response, and the metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kelp.core.exchange import Tensors
from kelp.core.messages import RequestTimings, RequestUsage
from kelp.core.metrics import (
    CACHED_TOKENS,
    ITL,
    ONBOARDED_BLOCKS,
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


def summary_tensors(jobs: Sequence[Job], num_output_tokens: int) -> Tensors:
    """Tensors of the request's last response alone; names from design §2.

    Blocks are counted over all sequences. What is said of the prompt, and when it was computed, is sequence 0's.
    """
    first = jobs[0]
    prefill_usage, timings = _prefill_side(first)
    usages = [_decode_usage(job) for job in jobs]
    num_new, num_reused = sum(usage.new_blocks for usage in usages), sum(usage.reused_blocks for usage in usages)
    int32 = {
        "cached_tokens": prefill_usage.cached_tokens,
        "kv_cache_alloc_new_blocks": num_new,
        "kv_cache_reused_blocks": num_reused,
        "kv_cache_alloc_total_blocks": num_new + num_reused,
    }
    int64 = {
        "arrival_time_ns": first.arrival_ns,
        "first_scheduled_time_ns": _scheduled_ns(first, timings),
        "first_token_time_ns": first.first_sent_ns,
        "last_token_time_ns": max(job.last_received_ns for job in jobs),
    }
    uint32 = {"num_input_tokens": len(first.prompt.input_ids), "num_output_tokens": num_output_tokens}
    worker_ids = dict.fromkeys(worker_id for job in jobs for worker_id in job.worker_ids)
    return {
        **_scalars(int32, np.int32),
        **_scalars(int64, np.int64),
        **_scalars(uint32, np.uint32),
        "worker_ids": np.array([worker_id.encode() for worker_id in worker_ids], dtype=np.object_),
    }


def _scalars(values: dict[str, int], dtype: type[np.generic]) -> dict[str, npt.NDArray[np.generic]]:
    """A tensor for each value; all are views of one array, which is faster made than many."""
    array = np.array(list(values.values()), dtype=dtype)
    return {name: array[index : index + 1] for index, name in enumerate(values)}


def _scheduled_ns(job: Job, timings: RequestTimings) -> int:
    """By this host's clock: what the worker's says may be hours away, but the time it waited there is not."""
    if job.arrival_ns <= timings.first_scheduled_ns <= job.first_sent_ns or not timings.first_scheduled_ns:
        return timings.first_scheduled_ns
    return job.arrival_ns + max(0, timings.first_scheduled_ns - timings.arrival_ns)


def observe(metrics: Metrics, jobs: Sequence[Job], num_responses: int, now_ns: int) -> None:
    """Count a finished request and where its time went; the longest sequence has the time between tokens."""
    first = jobs[0]
    prefill_usage, _ = _prefill_side(first)
    metrics.add(PROMPT_TOKENS, len(first.prompt.input_ids))
    metrics.add(OUTPUT_TOKENS, sum(len(job.generated) for job in jobs))
    metrics.add(CACHED_TOKENS, prefill_usage.cached_tokens)
    metrics.add(RESPONSES, num_responses)
    metrics.add(ONBOARDED_BLOCKS, prefill_usage.onboarded_blocks)
    metrics.add(TRANSFERRED_BLOCKS, sum(_decode_usage(job).transferred_blocks for job in jobs))
    if first.first_sent_ns:
        metrics.observe(TTFT, (first.first_sent_ns - first.arrival_ns) / 1e9)
        num_tokens = max(len(job.generated) for job in jobs)
        if num_tokens > 1:
            metrics.observe(ITL, (now_ns - first.first_sent_ns) / 1e9 / (num_tokens - 1))
    for phase, seconds in phases(first).items():
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
