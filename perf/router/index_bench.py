"""The index against Dynamo's RadixTree: one core, the same events and prompts, turn by turn, and the same answers."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from perf.machine import REPOSITORY
from perf.reporter import Reporter
from perf.router import index_churn
from perf.router.index_workload import QUERY_BLOCKS, IndexCase
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import MIN_PAIRS, Pair, median, paired_ratio
from perf.suite import BenchError

CASES = tuple(IndexCase(workers, percent) for workers in (64, 1024) for percent in (0, 1, 10))
PEER = REPOSITORY / "perf" / "peers" / "dynamo"
_REFERENCE = "Dynamo RadixTree"
_INGEST_BAR = 1.0
_MATCH_BAR = 2.0
_NUM_ROUNDS_LONG = 15
_NUM_TURNS = 5
_ANSWER_TIMEOUT_S = 120.0
_PR_SET_PDEATHSIG = 1


class IndexProcess:
    """One index in a process of its own, idle but while it is asked."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self._name = name
        self._process = process
        self._log = log

    def ask(self, do: str, **details: object) -> object:
        """Give a command and wait for its answer.

        Raises:
            BenchError: It died, quoting its last words, or is silent for too long.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(self._last_words()) from None
        readable, _, _ = select.select([self._process.stdout], [], [], _ANSWER_TIMEOUT_S)
        if not readable:
            raise BenchError(f"{self._name}: silent for {_ANSWER_TIMEOUT_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(self._last_words())
        return json.loads(line)

    def figure(self, do: str, **details: object) -> float:
        """`ask` for one number."""
        answer = self.ask(do, **details)
        assert isinstance(answer, float | int)
        return answer

    def ingest(self) -> tuple[float, float]:
        """Blocks per second, and growth of the process in bytes."""
        answer = self.ask("ingest")
        assert isinstance(answer, list)
        return answer[0], answer[1]

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self._name}: {(lines or ['no output'])[-1].strip()[-300:]}"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _running(name: str, python: Path, logs: Path) -> Iterator[IndexProcess]:
    log = logs / f"{name}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(python), "-m", f"perf.router.index_{name}"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=_die_with_parent,
        )
    try:
        yield IndexProcess(name, process, log)
    finally:
        process.kill()
        process.communicate()


class _Duel:
    """Rounds of one case; figures in pairs, kelp's first."""

    def __init__(self, kelp: IndexProcess, dynamo: IndexProcess, case: IndexCase) -> None:
        self._sides = (kelp, dynamo)
        self._case = case
        self._growth_bytes: list[float] = []
        self.figures: dict[str, list[Pair]] = {}

    def run(self, num_rounds: int) -> None:
        """Measure, and see that both say the same.

        Raises:
            BenchError: They do not, or one of them fails.
        """
        case = dataclasses.asdict(self._case)
        if len({side.figure("load", case=case) for side in self._sides}) > 1:
            raise BenchError(f"{self._case.name}: the histories differ")
        for _ in range(num_rounds):
            rates = [side.ingest() for side in self._sides]
            self._growth_bytes = self._growth_bytes or [growth for _, growth in rates]
            self._note("ingest", [rate for rate, _ in rates])
            for length in QUERY_BLOCKS:
                self._note(f"match_{length}", self._match_rates(length))
        for length in QUERY_BLOCKS:
            if len({str(side.ask("answers", length=length)) for side in self._sides}) > 1:
                raise BenchError(f"{self._case.name}: prompts of {length} blocks are matched differently")

    def _match_rates(self, length: int) -> list[float]:
        """Each side's rate over several short turns, so that a noisy moment hits both."""
        turns = [[side.figure("match", length=length) for side in self._sides] for _ in range(_NUM_TURNS)]
        return [_NUM_TURNS / sum(1 / rate for rate in rates) for rates in zip(*turns, strict=True)]

    def _note(self, metric: str, rates: list[float]) -> None:
        self.figures.setdefault(metric, []).append(Pair(*rates))

    def rows(self) -> Iterator[Measurement]:
        """What has been measured."""
        for metric, pairs in self.figures.items():
            bar = _INGEST_BAR if metric == "ingest" else _MATCH_BAR
            if metric != "ingest" and self._case.percent_open > 1:
                bar = None
            ratio = paired_ratio(pairs, is_lower_better=False)
            comparison = Comparison(_REFERENCE, median([pair.reference for pair in pairs]), ratio, bar)
            yield Measurement(
                self._case.name, f"{metric}/dynamo", _unit(metric), median([pair.value for pair in pairs]), comparison
            )
        ours, theirs = (growth / self._case.num_pairs for growth in self._growth_bytes)
        comparison = Comparison(_REFERENCE, theirs, None)
        yield Measurement(self._case.name, "bytes_per_entry", "bytes", ours, comparison)


def _unit(metric: str) -> str:
    return "blocks/s" if metric == "ingest" else "queries/s"


def _required() -> Iterator[RequiredRow]:
    for case in CASES:
        for metric in ("ingest", *(f"match_{length}" for length in QUERY_BLOCKS)):
            yield RequiredRow(case.name, f"{metric}/dynamo", _unit(metric), needs_reference=True)
        yield RequiredRow(case.name, "bytes_per_entry", "bytes")
    yield from index_churn.REQUIRED


REQUIRED: tuple[RequiredRow, ...] = tuple(_required())


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`."""
    for measurement in index_churn.rows():
        reporter.add(measurement)
    for case in CASES:
        started_s = time.monotonic()
        try:
            if not (PEER / ".installed").is_file():
                raise BenchError("dynamo is not installed; run make bench-peers")
            with ExitStack() as stack:
                # New processes for every case: memory that the last one left would be missing from the growth.
                logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kelp-bench-")))
                kelp = stack.enter_context(_running("kelp", Path(sys.executable), logs))
                dynamo = stack.enter_context(_running("dynamo", PEER / "bin" / "python", logs))
                duel = _Duel(kelp, dynamo, case)
                duel.run(_NUM_ROUNDS_LONG if is_long else MIN_PAIRS)
        except BenchError as error:
            reporter.explain(case.name, str(error))
            reporter.say(f"({error})")
        else:
            for measurement in duel.rows():
                reporter.add(measurement)
            reporter.say(f"({case.name}: {time.monotonic() - started_s:.0f} s)")
