"""How long streams stand still when their decode worker's server is killed, against the cold TTFT of their prompts.

A kill makes several streams resume at once, so the cold prompts are asked at once, too, as many as there are streams;
what one alone takes is printed beside it, and is what a stream that is alone is compared with.

Where nobody else has anything of the prompts' KV (no prefill worker, no block manager, every prompt its own salt), with
several streams and with one, and where the prefill worker and the block manager have it, as usual.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from itertools import pairwise

from kelp.chaos.faults import Layout
from kelp.chaos.fleet import ServedFleet
from kelp.chaos.fleet_spec import MANAGER_SETTING, FleetSpec, quick_settings
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
_NUM_TOKENS = 150
_NUM_DRAWN = 4
"""Prompts, of which the longest is asked."""
_KILL_AFTER_S = 1.0
_SLACK_S = 5.0
_HEAL_S = 90.0
_POLL_S = 0.5
_MS = 1e3
_NUM_ROUNDS, _NUM_LONG_ROUNDS = 5, 10


@dataclass(frozen=True, slots=True)
class _Case:
    """A fleet, how many streams it has, and how many cold TTFTs they may stand still."""

    name: str
    fleet: FleetSpec
    most: float
    num_streams: int = 6


@dataclass(frozen=True, slots=True)
class _Round:
    """One kill, all times in seconds.

    Attributes:
        pairs: Standstill and cold TTFT of the streams that the worker had.
        lone_s: Cold TTFT of one of them when nothing else runs.
    """

    pairs: tuple[Pair, ...]
    lone_s: float
    num_failed: int


_UNCACHED = FleetSpec(Layout.ISOLATED, num_prefill=0, settings={**quick_settings("mock"), MANAGER_SETTING: "false"})
_CASES = (
    _Case("resume", _UNCACHED, 2.0),
    _Case("resume_alone", _UNCACHED, 2.0, num_streams=1),
    _Case("resume_cached", FleetSpec(Layout.ISOLATED, settings=quick_settings("mock")), 1.0),
)
REQUIRED = (
    *(RequiredRow(WORKER_KILL, f"{case.name}_p50/cold-ttft", "ms", needs_reference=True) for case in _CASES),
    *(RequiredRow(WORKER_KILL, f"{case.name}_p99/cold-ttft", "ms") for case in _CASES),
    RequiredRow(WORKER_KILL, "failed", "count"),
)


def run(reporter: Reporter, is_long: bool) -> None:
    """Kill the server of a decode worker under its streams, again and again."""
    num_failed = 0
    for case in _CASES:
        with serving(case.fleet) as fleet:
            rounds = asyncio.run(_rounds(fleet, case, _NUM_LONG_ROUNDS if is_long else _NUM_ROUNDS, reporter))
        num_failed += sum(item.num_failed for item in rounds)
        _report(reporter, case, rounds)
    reporter.add(none_allowed(WORKER_KILL, "failed", num_failed))


def _report(reporter: Reporter, case: _Case, rounds: list[_Round]) -> None:
    """Medians of the rounds make the interval; the tails are those of all streams, kills and cold prompts alike."""
    of_all = [pair for item in rounds for pair in item.pairs]
    if not of_all:
        raise BenchError(f"{case.name}: no stream was on a worker when it was killed")
    typical = [
        Pair(median([pair.value for pair in item.pairs]), median([pair.reference for pair in item.pairs]))
        for item in rounds
        if item.pairs
    ]
    resumes, colds = [pair.value for pair in of_all], [pair.reference for pair in of_all]
    ratio = paired_ratio(typical, is_lower_better=True)
    for share, name, found in ((0.5, "p50", ratio), (0.99, "p99", None)):
        value, cold = percentile(resumes, share), percentile(colds, share)
        within = found or paired_ratio([Pair(value, cold)] * _NUM_ROUNDS, is_lower_better=True)
        comparison = Comparison("cold TTFT", cold * _MS, within, 1.0 / case.most)
        reporter.add(Measurement(WORKER_KILL, f"{case.name}_{name}/cold-ttft", "ms", value * _MS, comparison))
    if case.num_streams == 1:
        return
    lone = [Pair(pair.value, item.lone_s) for pair, item in zip(typical, (r for r in rounds if r.pairs), strict=True)]
    typical_s, lone_s = median([pair.value for pair in lone]), median([pair.reference for pair in lone])
    comparison = Comparison("cold TTFT, alone", lone_s * _MS, paired_ratio(lone, is_lower_better=True))
    reporter.add(Measurement(WORKER_KILL, f"{case.name}_p50/lone-cold-ttft", "ms", typical_s * _MS, comparison))


async def _rounds(fleet: ServedFleet, case: _Case, num_rounds: int, reporter: Reporter) -> list[_Round]:
    client = LlmClient(fleet.endpoint)
    load = Load(client, MockReference(fleet.spec.model_folder), _SLACK_S)
    questions, killed = Questions(1, 50), set[str]()
    try:
        found = []
        for number in range(num_rounds):
            await _wait_whole(fleet, killed)
            streams = [_long(questions, f"round {number} {index}") for index in range(case.num_streams)]
            lone = await load.ask(_cold(streams[0], "alone"))
            cold = await load.ask_all([_cold(question, "together") for question in streams])
            answers = await _kill(fleet, load, streams)
            killed.add(answers.epoch)
            pairs = tuple(
                Pair(gap_s, first.token_times_s[0] - first.started_s)
                for first, gap_s in zip(cold, answers.gaps_s, strict=True)
                if gap_s is not None and first.token_times_s
            )
            asked = (lone, *cold, *answers.answered)
            num_failed = sum(item.judgement.outcome is not Outcome.COMPLETED for item in asked)
            lone_s = lone.token_times_s[0] - lone.started_s if lone.token_times_s else 0.0
            found.append(_Round(pairs, lone_s, num_failed))
            for trouble in load.troubles:
                judgement = trouble.judgement
                reporter.say(f"({judgement.outcome.value} {judgement.code}: {judgement.text[:120]})")
            load.troubles.clear()
            told = ", ".join(f"{pair.value * _MS:.0f} ({pair.reference * _MS:.0f})" for pair in pairs)
            reporter.say(
                f"(round {number}: {answers.victim}, streams stood still (cold TTFT) for ms: {told or 'none moved'})"
            )
        return found
    finally:
        await client.close()


@dataclass(frozen=True, slots=True)
class _Answers:
    """Of the streams of a round, and how long each that the worker had stood still; None for the others."""

    victim: str
    epoch: str
    answered: list[Answered]
    gaps_s: list[float | None]


async def _kill(fleet: ServedFleet, load: Load, questions: list[Question]) -> _Answers:
    asking = [asyncio.ensure_future(load.ask(question)) for question in questions]
    await asyncio.sleep(_KILL_AFTER_S)
    victim, num_running = await _busiest(fleet)
    epoch, server = fleet.records()[victim].epoch, fleet.server_of(victim)
    if server is None:
        raise BenchError(f"{victim} has no server")
    killed_s = time.monotonic()
    server.kill()
    answered = list(await asyncio.gather(*asking))
    gaps_s = [standstill_s(item.token_times_s, killed_s) for item in answered]
    # A stream does not say where it was before; as many as the worker had are those that stood still longest.
    longest_s = sorted(gaps_s, reverse=True)[:num_running]
    return _Answers(victim, epoch, answered, [gap_s if gap_s in longest_s and gap_s > 0 else None for gap_s in gaps_s])


async def _busiest(fleet: ServedFleet) -> tuple[str, int]:
    """The decode worker that has most streams, and how many."""
    workers = fleet.worker_client()
    try:
        statuses = [(name, await fleet.status(name, workers)) for name in fleet.spec.decode_workers]
    finally:
        await workers.close()
    running = {name: status.num_running for name, status in statuses if status is not None}
    if not running:
        raise BenchError("no decode worker answers")
    victim = max(running, key=lambda name: running[name])
    return victim, running[victim]


def standstill_s(times_s: tuple[float, ...], moment_s: float) -> float:
    """Longest wait for a token after a moment; 0 for a stream that had ended.

    Not the first one: a token that the worker had sent before may still be on its way.
    """
    return max(
        (later - max(earlier, moment_s) for earlier, later in pairwise(times_s) if later > moment_s), default=0.0
    )


async def _wait_whole(fleet: ServedFleet, killed: set[str]) -> None:
    """Wait until everything is there, and no record of an incarnation that was killed."""
    deadline_s = time.monotonic() + _HEAL_S
    while missing := (await asyncio.to_thread(fleet.missing)) + [
        name for name, record in fleet.records().items() if record.epoch in killed
    ]:
        if time.monotonic() > deadline_s:
            raise BenchError(f"not back after {_HEAL_S:.0f} s: {', '.join(missing)}")
        await asyncio.sleep(_POLL_S)


def _long(questions: Questions, salt: str) -> Question:
    longest = max((questions.next() for _ in range(_NUM_DRAWN)), key=lambda question: len(question.prompt))
    return replace(longest, max_tokens=_NUM_TOKENS, sampling=SamplingParams(), num_sequences=1, salt=salt)


def _cold(question: Question, how: str) -> Question:
    return replace(question, salt=f"cold {how} {question.salt}", max_tokens=4)
