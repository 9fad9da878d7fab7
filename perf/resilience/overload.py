"""Goodput under 0.5 to 4 times what a fleet can do, with kelp's admission and without.

The fleet is slow on purpose (few slots, long steps), so that not the machine but the workers are the limit. A request
is good if it was answered, all of it, within its deadline.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from kelp.chaos.faults import Layout
from kelp.chaos.fleet_spec import FleetSpec, quick_settings
from kelp.chaos.load import Answered, Load
from kelp.chaos.questions import MockReference, Question, Questions
from kelp.chaos.verdict import Outcome
from kelp.client.grpc import LlmClient
from perf.machine import REPOSITORY
from perf.reporter import Reporter
from perf.resilience.fleets import at_least, serving
from perf.rows import Measurement, RequiredRow

OVERLOAD = "overload"
_FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_DURATION_S, _LONG_DURATION_S = 8.0, 20.0
_LEAST_SHARE = 0.9
_STEP_S = 0.05
_NUM_SLOTS = 4
_NUM_WORKERS = 2
_NUM_TOKENS = 16
_DEADLINE_S = 4.0
_SLACK_S = 5.0
_SEED = 7
_POOL_SIZE = 400
_WITH, _WITHOUT = "admission", "no-admission"
_SETTINGS = {
    **quick_settings("mock"),
    "executor.max_running": str(_NUM_SLOTS),
    "mock.timing.step_s": str(_STEP_S),
}
_NO_ADMISSION = {"queue.max_waiting": "0", "executor.max_waiting": "100000"}
REQUIRED = (RequiredRow(OVERLOAD, "goodput_at_3x/peak", "ratio"),)


@dataclass(frozen=True, slots=True)
class _Point:
    """What came of one rate."""

    factor: float
    goodput: float
    shed: int
    late: int


def run(reporter: Reporter, is_long: bool) -> None:
    """See the module docstring."""
    curves = {
        name: _curve(reporter, name, is_long, {**_SETTINGS, **extra})
        for name, extra in ((_WITH, {}), (_WITHOUT, _NO_ADMISSION))
    }
    for name, points in curves.items():
        for point in points:
            metric = f"goodput_at_{point.factor:g}x/{name}"
            reporter.add(Measurement(OVERLOAD, metric, "requests/s", point.goodput))
    shares = {name: _share(points) for name, points in curves.items()}
    reporter.add(at_least(OVERLOAD, "goodput_at_3x/peak", "ratio", shares[_WITH], _LEAST_SHARE))
    reporter.add(Measurement(OVERLOAD, f"goodput_at_3x/peak/{_WITHOUT}", "ratio", shares[_WITHOUT]))
    _plot(reporter, curves)


def _share(points: list[_Point]) -> float:
    peak = max(point.goodput for point in points)
    return next(point.goodput for point in points if point.factor == 3.0) / peak if peak else 0.0


def _capacity() -> float:
    """Requests per second if every slot always decoded: what the workers could do at most."""
    return _NUM_WORKERS * _NUM_SLOTS / (_NUM_TOKENS * _STEP_S)


def _curve(reporter: Reporter, name: str, is_long: bool, settings: dict[str, str]) -> list[_Point]:
    spec = FleetSpec(Layout.COMPACT, num_prefill=0, num_decode=_NUM_WORKERS, settings=settings)
    duration_s = _LONG_DURATION_S if is_long else _DURATION_S
    with serving(spec) as fleet:
        reference = MockReference(spec.model_folder)
        points = []
        for factor in _FACTORS:
            answers = asyncio.run(_offer(fleet.endpoint, reference, _capacity() * factor, duration_s))
            points.append(_judge(factor, answers, duration_s))
            reporter.say(
                f"({name}: {factor:g}x, {len(answers)} requests, {points[-1].goodput:.1f} good/s, "
                f"{points[-1].shed} shed, {points[-1].late} late)"
            )
    return points


async def _offer(endpoint: str, reference: MockReference, rate: float, duration_s: float) -> list[Answered]:
    """Requests at random times, whether or not the ones before were answered."""
    rng, questions, client = random.Random(_SEED), Questions(_SEED, _POOL_SIZE), LlmClient(endpoint)
    load = Load(client, reference, _SLACK_S)
    try:
        asked, at_s, end_s = [], time.monotonic(), time.monotonic() + duration_s
        while at_s < end_s:
            asked.append(asyncio.ensure_future(load.ask(_question(questions))))
            at_s += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        return list(await asyncio.gather(*asked))
    finally:
        await client.close()


def _question(questions: Questions) -> Question:
    return replace(questions.next(), max_tokens=_NUM_TOKENS, num_sequences=1, deadline_s=_DEADLINE_S)


def _judge(factor: float, answers: list[Answered], duration_s: float) -> _Point:
    outcomes = [answered.judgement.outcome for answered in answers]
    in_time = [
        answered
        for answered in answers
        if answered.judgement.outcome is Outcome.COMPLETED and answered.ended_s - answered.started_s <= _DEADLINE_S
    ]
    num_shed = outcomes.count(Outcome.SHED)
    # What was offered in `duration_s` ends up to a deadline later; over the time that it took, goodput is comparable.
    took_s = max(answered.ended_s for answered in answers) - min(answered.started_s for answered in answers)
    return _Point(factor, len(in_time) / max(took_s, duration_s), num_shed, len(answers) - len(in_time) - num_shed)


def _plot(reporter: Reporter, curves: dict[str, list[_Point]]) -> None:
    try:
        import matplotlib
    except ImportError:
        reporter.say("(no plot: matplotlib is not installed)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in curves.items():
        axes.plot([point.factor for point in points], [point.goodput for point in points], marker="o", label=name)
    axes.set_xlabel("offered load / capacity")
    axes.set_ylabel("requests/s answered within their deadline")
    axes.legend()
    path: Path = REPOSITORY / "perf" / "results" / "resilience_overload.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    reporter.say(f"(plot: {path.relative_to(REPOSITORY)})")
