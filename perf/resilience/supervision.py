"""What supervision costs while nothing fails: one fleet, its supervisor running in one round and stopped in the next.

The supervisor is a process of its own (`kelp serve`), so SIGSTOP takes it away and leaves everything else as it is: the
same servers, the same workers, the same caches.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import psutil

from kelp.chaos.faults import Layout
from kelp.chaos.fleet import ServedFleet
from kelp.chaos.fleet_spec import FleetSpec
from kelp.chaos.load import Load
from kelp.chaos.questions import MockReference, Question, Questions
from kelp.chaos.verdict import Outcome
from kelp.client.grpc import LlmClient
from kelp.core.messages import SamplingParams
from perf.reporter import Reporter
from perf.resilience.fleets import at_most, serving
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Pair, median, paired_ratio
from perf.suite import BenchError

SUPERVISION = "supervision"
_NUM_ROUNDS, _NUM_LONG_ROUNDS = 45, 250
_NUM_REQUESTS = 160
"""Of a round, about a second: short, so that what else goes on meets both rounds of a pair; the supervisor looks twice
in it."""
_NUM_USERS = 4
_NUM_TOKENS = 32
_POOL_SIZE = 64
_SLACK_S = 5.0
_MOST = 1.03
"""The upper end of the interval of what supervision costs."""
_MS = 1e3
REQUIRED = (
    RequiredRow(SUPERVISION, "request_time", "ms", needs_reference=True),
    RequiredRow(SUPERVISION, "cost_upper_end", "ratio", needs_reference=True),
    RequiredRow(SUPERVISION, "cpu_per_request", "ms"),
)


@dataclass(frozen=True, slots=True)
class _Side:
    """One round with the supervisor, or without.

    Attributes:
        wall_s: Per request, of all users together.
        cpu_s: Per request, of all the fleet's processes.
    """

    wall_s: float
    cpu_s: float


def run(reporter: Reporter, is_long: bool) -> None:
    """See the module docstring."""
    spec = FleetSpec(Layout.COMPACT, num_prefill=0, num_decode=2, settings={"mock.speedup": "0"})
    with serving(spec) as fleet:
        rounds = asyncio.run(_rounds(fleet, _NUM_LONG_ROUNDS if is_long else _NUM_ROUNDS))
    walls = [Pair(with_it.wall_s, without.wall_s) for with_it, without in rounds]
    cpus = [Pair(with_it.cpu_s, without.cpu_s) for with_it, without in rounds]
    wall = paired_ratio(walls, is_lower_better=True)
    if wall is None:
        raise BenchError("too few rounds for an interval")
    reporter.add(_row("request_time", walls, bar=1.0))
    reporter.add(at_most(SUPERVISION, "cost_upper_end", "ratio", 1.0 / wall.low, _MOST))
    reporter.add(_row("cpu_per_request", cpus, bar=None))


def _row(metric: str, pairs: list[Pair], bar: float | None) -> Measurement:
    """The bar is that the interval does not exclude that it costs nothing."""
    ratio = paired_ratio(pairs, is_lower_better=True)
    without = median([pair.reference for pair in pairs]) * _MS
    comparison = Comparison("no supervision", without, ratio, bar, is_bar_for_best=True)
    return Measurement(SUPERVISION, metric, "ms", median([pair.value for pair in pairs]) * _MS, comparison)


async def _rounds(fleet: ServedFleet, num_rounds: int) -> list[tuple[_Side, _Side]]:
    client = LlmClient(fleet.endpoint)
    load = Load(client, MockReference(fleet.spec.model_folder), _SLACK_S)
    questions = Questions(3, _POOL_SIZE)
    supervisor = fleet.supervisor
    try:
        await _side(fleet, load, [*map(_plain, questions.pool)])
        found = []
        for number in range(num_rounds):
            sides: dict[bool, _Side] = {}
            asked = [_plain(questions.next()) for _ in range(_NUM_REQUESTS)]
            for is_supervised in (True, False) if number % 2 else (False, True):
                with contextlib.nullcontext() if is_supervised else _stopped(supervisor):
                    sides[is_supervised] = await _side(fleet, load, asked)
            found.append((sides[True], sides[False]))
        return found
    finally:
        await client.close()


@contextlib.contextmanager
def _stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def _side(fleet: ServedFleet, load: Load, questions: Sequence[Question]) -> _Side:
    """Both sides of a pair ask the same, of which caches have everything."""
    processes, left = fleet.processes(), iter(questions)
    before_s, started_s = _cpu_s(processes), time.monotonic()

    async def user() -> None:
        for question in left:
            answered = await load.ask(question)
            if answered.judgement.outcome is not Outcome.COMPLETED:
                raise BenchError(f"a request {answered.judgement.outcome.value}: {answered.judgement.text[:200]}")

    await asyncio.gather(*(user() for _ in range(_NUM_USERS)))
    took_s = time.monotonic() - started_s
    return _Side(took_s / len(questions), (_cpu_s(processes) - before_s) / len(questions))


def _cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(item.user + item.system for item in times)


def _plain(question: Question) -> Question:
    return replace(question, max_tokens=_NUM_TOKENS, sampling=SamplingParams(), num_sequences=1, salt="")
