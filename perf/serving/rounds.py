"""Interleaved rounds: every contestant gets the same prompts in turn, so that noise hits all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from perf.serving.deployment import Deployment
from perf.serving.load import Answer, LoadResult, LoadSpec, run_load
from perf.serving.processes import cpu_times_s, total_by_name
from perf.serving.prompts import make_prompts
from perf.serving.scrape import RequestTimes, read_request_times, wait_for_requests
from perf.serving.transformers_reference import Batches, TransformersReference
from perf.stats import Pair
from perf.suite import BenchError

INPUT_TOKENS = 128
OUTPUT_TOKENS = 64
REQUEST_TIMEOUT_S = 120.0
_WARM_UP_TOKENS = 8
CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Level:
    """A concurrency, and how much of it one round is."""

    concurrency: int
    num_requests: int
    num_rounds: int

    @property
    def name(self) -> str:
        """As case names have it."""
        return f"c{self.concurrency}"

    def prompts(self, round_number: int) -> tuple[str, ...]:
        """What every contestant gets in a round; no other round has them."""
        return make_prompts(self.num_requests, INPUT_TOKENS, seed=self.concurrency * 1000 + round_number)


@dataclass(slots=True)
class Samples:
    """What a deployment did at one level.

    Attributes:
        rounds: Answers by round.
        cpu_s: CPU time by process over all rounds, the client's included.
        times: What the server's own metrics say of these requests.
        trouble: Why it was given up; empty otherwise.
    """

    deployment: Deployment
    rounds: list[tuple[Answer, ...]] = field(default_factory=list)
    cpu_s: dict[str, float] = field(default_factory=dict)
    times: RequestTimes | None = None
    trouble: str = ""

    def answers(self) -> list[Answer]:
        """Of all rounds."""
        return [answer for answers in self.rounds for answer in answers]

    def take(self, result: LoadResult, cpu_s: dict[str, float]) -> None:
        """Add a round."""
        self.rounds.append(result.answers)
        self.cpu_s = total_by_name((self.cpu_s, cpu_s, {CLIENT: result.client_cpu_s}))

    def complaint(self) -> str:
        """Why the figures must not be trusted; empty if they may."""
        if self.trouble:
            return self.trouble
        answers = self.answers()
        failed = [answer for answer in answers if answer.error]
        if failed:
            return f"{len(failed)} of {len(answers)} requests failed, first: {failed[0].error[:200]}"
        needed = self.deployment.num_workers
        astray = [answer for answer in answers if len(set(answer.worker_ids)) != needed]
        if astray:
            return f"{len(astray)} of {len(answers)} requests were not served by {needed} worker(s)"
        return ""


@dataclass(slots=True)
class LevelResult:
    """All contestants at one level; `reference` has tokens/s by round."""

    level: Level
    samples: dict[str, Samples]
    reference: list[float] = field(default_factory=list)
    reference_trouble: str = ""


class Contest:
    """The contestants; `reference` None if it could not be started, for `reference_trouble`."""

    def __init__(
        self, deployments: Sequence[Deployment], reference: TransformersReference | None, reference_trouble: str = ""
    ) -> None:
        self._deployments = deployments
        self._reference = reference
        self._reference_trouble = reference_trouble

    def run(self, level: Level, say: Callable[[str], None]) -> LevelResult:
        """Warm everybody up, then let them take turns."""
        samples = {item.mode: Samples(item) for item in self._deployments}
        result = LevelResult(level, samples, reference_trouble=self._reference_trouble)
        before = {mode: _start(item, level) for mode, item in samples.items()}
        for number in range(level.num_rounds):
            say(f"({level.name}: round {number + 1} of {level.num_rounds})")
            prompts = level.prompts(number)
            turns = [*samples.values(), None]
            # Rotating the order keeps what one contestant leaves behind (heat, caches) from always hitting the same.
            for shift in range(len(turns)):
                contestant = turns[(number + shift) % len(turns)]
                if contestant is None:
                    self._reference_round(level, prompts, result)
                elif not contestant.trouble:
                    _round(contestant, level, prompts)
        for mode, item in samples.items():
            _finish(item, before[mode])
        return result

    def _reference_round(self, level: Level, prompts: tuple[str, ...], result: LevelResult) -> None:
        if self._reference is None or result.reference_trouble:
            return
        # One batch a round is enough: a static batch has no ramp-up or ramp-down to average over.
        batch = Batches(prompts[: level.concurrency], level.concurrency, OUTPUT_TOKENS)
        try:
            tokens_per_s = self._reference.tokens_per_s(batch)
        except BenchError as error:
            result.reference_trouble = self._reference_trouble = str(error)
        else:
            result.reference.append(tokens_per_s)


def _spec(deployment: Deployment, level: Level, prompts: tuple[str, ...]) -> LoadSpec:
    return LoadSpec(deployment.grpc_endpoint, prompts, OUTPUT_TOKENS, level.concurrency, REQUEST_TIMEOUT_S)


def _start(samples: Samples, level: Level) -> RequestTimes | None:
    """Warm up; the server's metrics when that was over."""
    deployment = samples.deployment
    prompts = make_prompts(level.concurrency, INPUT_TOKENS, seed=-level.concurrency)
    try:
        before = read_request_times(deployment.metrics_url)
        run_load(replace(_spec(deployment, level, prompts), max_tokens=_WARM_UP_TOKENS))
        wait_for_requests(deployment.metrics_url, before, len(prompts))
        return read_request_times(deployment.metrics_url)
    except BenchError as error:
        samples.trouble = str(error)
        return None


def _round(samples: Samples, level: Level, prompts: tuple[str, ...]) -> None:
    deployment = samples.deployment
    cpu_before_s = cpu_times_s(deployment.pids)
    try:
        result = run_load(_spec(deployment, level, prompts))
    except BenchError as error:
        samples.trouble = str(error)
        return
    cpu_after_s = cpu_times_s(deployment.pids)
    samples.take(result, {name: cpu_after_s[name] - cpu_before_s[name] for name in cpu_after_s})
    if all(answer.error for answer in result.answers):
        samples.trouble = f"every request of a round failed, first: {result.answers[0].error[:200]}"


def _finish(samples: Samples, before: RequestTimes | None) -> None:
    if before is None or samples.trouble:
        return
    try:
        samples.times = wait_for_requests(samples.deployment.metrics_url, before, len(samples.answers()))
    except BenchError as error:
        samples.trouble = str(error)


def pairs_of(values: Sequence[float], references: Sequence[float]) -> list[Pair]:
    """Round by round, as long as both have one."""
    return [Pair(value, reference) for value, reference in zip(values, references, strict=False)]
