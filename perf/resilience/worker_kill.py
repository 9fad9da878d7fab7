"""How long streams stand still when their decode worker's server is killed, against the cold TTFT of their prompts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import pairwise

from kelp.chaos.faults import Layout
from kelp.chaos.fleet import ServedFleet
from kelp.chaos.fleet_spec import FleetSpec, quick_settings
from kelp.chaos.load import Answered, Load
from kelp.chaos.questions import MockReference, Question, Questions
from kelp.chaos.verdict import Outcome
from kelp.client.grpc import LlmClient
from kelp.core.messages import SamplingParams
from perf.reporter import Reporter
from perf.resilience.fleets import none_allowed, serving
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Pair, median, paired_ratio, percentile
from perf.suite import BenchError

WORKER_KILL = "worker_kill"
_NUM_STREAMS = 6
_NUM_TOKENS = 150
_NUM_DRAWN = 4
"""Prompts, of which the longest is asked."""
_KILL_AFTER_S = 0.5
_SLACK_S = 5.0
_HEAL_S = 90.0
_POLL_S = 0.5
_WORST = 2.0
"""A stream may stand still for so many cold TTFTs."""
_MS = 1e3
REQUIRED = (
    RequiredRow(WORKER_KILL, "resume_p50/cold-ttft", "ms", needs_reference=True),
    RequiredRow(WORKER_KILL, "resume_p99", "ms"),
    RequiredRow(WORKER_KILL, "failed", "count"),
)


def run(reporter: Reporter, is_long: bool) -> None:
    """Kill one decode worker's server under six streams, again and again; the cold TTFT is taken in between."""
    spec = FleetSpec(Layout.ISOLATED, settings=quick_settings("mock"))
    with serving(spec) as fleet:
        rounds = asyncio.run(_rounds(fleet, 15 if is_long else 5, reporter))
    resumes = [gap_s for gaps, _, _ in rounds for gap_s in gaps]
    pairs = [Pair(median(gaps), cold_s) for gaps, cold_s, _ in rounds if gaps]
    if not pairs:
        raise BenchError("no stream was on a worker when it was killed")
    comparison = Comparison(
        "cold TTFT", median([pair.reference for pair in pairs]) * _MS, paired_ratio(pairs, is_lower_better=True),
        1.0 / _WORST,
    )  # fmt: skip
    reporter.add(Measurement(WORKER_KILL, "resume_p50/cold-ttft", "ms", median(resumes) * _MS, comparison))
    reporter.add(Measurement(WORKER_KILL, "resume_p99", "ms", percentile(resumes, 0.99) * _MS))
    reporter.add(none_allowed(WORKER_KILL, "failed", sum(num_failed for _, _, num_failed in rounds)))


async def _rounds(fleet: ServedFleet, num_rounds: int, reporter: Reporter) -> list[tuple[list[float], float, int]]:
    """Of each round: gaps of the streams that had to move, cold TTFT, requests that failed."""
    client = LlmClient(fleet.endpoint)
    load = Load(client, MockReference(fleet.spec.model_folder), _SLACK_S)
    questions = Questions(1, 50)
    try:
        found = []
        for number in range(num_rounds):
            await _wait_whole(fleet)
            cold = [await load.ask(_cold(questions, number, index)) for index in range(3)]
            victim = fleet.spec.decode_workers[number % len(fleet.spec.decode_workers)]
            gaps, answers = await _kill(fleet, load, victim, [_long(questions) for _ in range(_NUM_STREAMS)])
            num_failed = sum(item.judgement.outcome is not Outcome.COMPLETED for item in (*cold, *answers))
            ttft_s = median([item.token_times_s[0] - item.started_s for item in cold if item.token_times_s])
            found.append((gaps, ttft_s, num_failed))
            for trouble in load.troubles:
                judgement = trouble.judgement
                reporter.say(f"({judgement.outcome.value} {judgement.code}: {judgement.text[:120]})")
            load.troubles.clear()
            told = ", ".join(f"{gap_s * _MS:.0f}" for gap_s in gaps)
            reporter.say(
                f"(round {number}: {victim}, streams stood still for {told or 'no'} ms; cold {ttft_s * _MS:.0f})"
            )
        return found
    finally:
        await client.close()


async def _kill(
    fleet: ServedFleet, load: Load, victim: str, questions: list[Question]
) -> tuple[list[float], list[Answered]]:
    asking = [asyncio.ensure_future(load.ask(question)) for question in questions]
    await asyncio.sleep(_KILL_AFTER_S)
    workers = fleet.worker_client()
    try:
        status = await fleet.status(victim, workers)
    finally:
        await workers.close()
    server = fleet.server_of(victim)
    if server is None:
        raise BenchError(f"{victim} has no server")
    killed_s = time.monotonic()
    server.kill()
    answers = list(await asyncio.gather(*asking))
    gaps = sorted((standstill_s(answered.token_times_s, killed_s) for answered in answers), reverse=True)
    # A stream does not say where it ran; those that stood still longest are those that the worker had.
    return gaps[: status.num_running if status is not None else 0], answers


def standstill_s(times_s: tuple[float, ...], moment_s: float) -> float:
    """Longest wait for a token after a moment; 0 for a stream that had ended.

    Not the first one: a token that the worker had sent before may still be on its way.
    """
    return max(
        (later - max(earlier, moment_s) for earlier, later in pairwise(times_s) if later > moment_s), default=0.0
    )


async def _wait_whole(fleet: ServedFleet) -> None:
    deadline_s = time.monotonic() + _HEAL_S
    while missing := await asyncio.to_thread(fleet.missing):
        if time.monotonic() > deadline_s:
            raise BenchError(f"not back after {_HEAL_S:.0f} s: {', '.join(missing)}")
        await asyncio.sleep(_POLL_S)


def _long(questions: Questions) -> Question:
    longest = max((questions.next() for _ in range(_NUM_DRAWN)), key=lambda question: len(question.prompt))
    return replace(longest, max_tokens=_NUM_TOKENS, sampling=SamplingParams(), num_sequences=1)


def _cold(questions: Questions, number: int, index: int) -> Question:
    return replace(_long(questions), salt=f"cold {number} {index}", max_tokens=4)
