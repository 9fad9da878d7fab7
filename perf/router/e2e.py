"""The whole request path against Dynamo's: mock workers that take no time, the same prompts, cores and client.

Both servers are up all along and take turns, round by round. Each is measured with a client that acknowledges at once
and with an ordinary one: Dynamo's HTTP server leaves Nagle's algorithm on, which costs an ordinary client of the same
host 40 ms, and a win by a socket option is none.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from perf.reporter import Reporter
from perf.router import dynamo, e2e_kelp, e2e_model
from perf.router.e2e_figures import METRICS, Figures, figures_of
from perf.router.loadgen import LoadSpec, run_load
from perf.router.loadgen_protocols import GENERATE_STREAM, OPENAI_SSE
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Pair, median, paired_ratio
from perf.suite import BenchError

NUM_WORKERS = 4
INPUT_TOKENS = 512
OUTPUT_TOKENS = 64
QUICK_ACK, PLAIN = "dynamo", "dynamo-plain"
"""What the metrics of the two kinds of client are called after."""

_NUM_ROUNDS = 5
_NUM_ROUNDS_LONG = 15
_NUM_WARM_UP = 40
_TTFT_BAR = {("e2e_c1", QUICK_ACK): 1.0}
_TOKENS_BAR = {("e2e_c64", QUICK_ACK): 0.5}
_BARS = {"ttft_p50": _TTFT_BAR, "tokens_per_s": _TOKENS_BAR}


@dataclass(frozen=True, slots=True)
class Level:
    """Requests at a time, and how many a round has."""

    concurrency: int
    num_requests: int

    @property
    def case(self) -> str:
        """Name of the case."""
        return f"e2e_c{self.concurrency}"


LEVELS = (Level(1, 30), Level(16, 160), Level(64, 320))


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two servers."""

    protocol: str
    http_port: int
    pids: Mapping[str, int]

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        return sum(_cpu_clock_s(pid) for pid in self.pids.values())

    def run(self, prompts: tuple[str, ...], concurrency: int, is_quick_ack: bool) -> Figures:
        """Send one load.

        Raises:
            BenchError: A request failed.
        """
        spec = LoadSpec(
            protocol=self.protocol,
            host=dynamo.HOST,
            port=self.http_port,
            model=dynamo.MODEL_NAME,
            prompts=prompts,
            max_tokens=OUTPUT_TOKENS,
            concurrency=concurrency,
            is_quick_ack=is_quick_ack,
        )
        cpu_before_s = self.cpu_s()
        result = run_load(spec)
        return figures_of(result, self.cpu_s() - cpu_before_s)


def _cpu_clock_s(pid: int) -> float:
    """The process's CPU-time clock: all threads, in nanoseconds (Linux, clock_getcpuclockid(3))."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        raise BenchError(f"process {pid} has gone") from None


def _required() -> Iterator[RequiredRow]:
    for level in LEVELS:
        for metric in METRICS:
            for client in (QUICK_ACK, PLAIN):
                yield RequiredRow(level.case, f"{metric.name}/{client}", metric.unit, needs_reference=True)


REQUIRED = tuple(_required())


class Contest:
    """Two servers that answer the same prompts in turn."""

    def __init__(self, kelp: Side, peer: Side, prompts: e2e_model.Prompts) -> None:
        self._kelp = kelp
        self._peer = peer
        self._prompts = prompts

    def warm_up(self) -> None:
        """Neither side pays for its first requests."""
        for side in (self._kelp, self._peer):
            side.run(self._prompts.take(_NUM_WARM_UP), 8, is_quick_ack=True)

    def rounds(self, level: Level, client: str, num_rounds: int) -> list[tuple[Figures, Figures]]:
        """Figures of kelp and the peer, round by round; who goes first alternates."""
        found = []
        for number in range(num_rounds):
            prompts = self._prompts.take(level.num_requests)
            order = (self._kelp, self._peer) if number % 2 == 0 else (self._peer, self._kelp)
            figures = {id(side): side.run(prompts, level.concurrency, client == QUICK_ACK) for side in order}
            found.append((figures[id(self._kelp)], figures[id(self._peer)]))
        return found


def measurements(case: str, client: str, rounds: list[tuple[Figures, Figures]]) -> Iterator[Measurement]:
    """The rows of one level and client."""
    acknowledges = "quick ack" if client == QUICK_ACK else "plain client"
    reference = f"{GENERATE_STREAM} v Dynamo {dynamo.VERSION} {OPENAI_SSE}, {acknowledges}"
    for metric in METRICS:
        pairs = [Pair(metric.of(ours), metric.of(theirs)) for ours, theirs in rounds]
        bar = _BARS.get(metric.name, {}).get((case, client))
        comparison = Comparison(
            reference, median([pair.reference for pair in pairs]), paired_ratio(pairs, metric.is_lower_better), bar
        )
        value = median([pair.value for pair in pairs])
        yield Measurement(case, f"{metric.name}/{client}", metric.unit, value, comparison)


def _start(stack: ExitStack, work: Path, model_folder: Path) -> tuple[Side, Side]:
    peer = stack.enter_context(dynamo.running(model_folder, NUM_WORKERS, work / "dynamo"))
    kelp = stack.enter_context(e2e_kelp.running(model_folder, NUM_WORKERS, work / "kelp"))
    return Side(GENERATE_STREAM, kelp.http_port, kelp.pids), Side(OPENAI_SSE, peer.http_port, peer.pids)


def run(reporter: Reporter, is_long: bool) -> None:
    """Measure and report all levels.

    Raises:
        BenchError: A server does not come up.
    """
    model_folder = e2e_model.build()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kelp-bench-")))
        kelp, peer = _start(stack, work, model_folder)
        contest = Contest(kelp, peer, e2e_model.Prompts(model_folder, INPUT_TOKENS, seed=time.time_ns()))
        contest.warm_up()
        for level in LEVELS:
            for client in (QUICK_ACK, PLAIN):
                try:
                    rounds = contest.rounds(level, client, _NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS)
                except BenchError as error:
                    reporter.explain(level.case, str(error))
                    continue
                for measurement in measurements(level.case, client, rounds):
                    reporter.add(measurement)
