"""kelp's executor alone, without Triton, against other engines and the memory bandwidth, on the same cores.

Engines are loaded one after the other, because their load times are reported, and then take turns.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from kelp.core.config import ModelConfig
from kelp.text.tokenizer import Tokenizer
from perf.executor import process
from perf.executor.bandwidth import Bandwidth, floor_tokens_per_s
from perf.executor.contest import Contest, EngineTurn
from perf.executor.engines import ENGINES, KELP, PEERS, THREADS
from perf.executor.process import EngineProcess
from perf.executor.tables import BANDWIDTH, contestants_of, required_rows, resource_rows, rows_of
from perf.executor.workloads import CASES, WARM_UP, Case
from perf.reporter import Reporter
from perf.suite import BenchError, Suite

_NUM_ROUNDS = 5
_NUM_ROUNDS_LONG = 15


def _model_folder() -> Path:
    folder = ModelConfig().path
    if not (folder / "config.json").is_file():
        raise BenchError(f"{folder}: no model here; run `make setup`")
    return folder


@contextmanager
def _same_cores() -> Iterator[None]:
    """Keep this process and its children on as many cores as an engine has threads."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:THREADS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _start_engines(stack: ExitStack, contest: Contest, reporter: Reporter, folder: Path) -> list[EngineProcess]:
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kelp-bench-")))
    tokenizer = Tokenizer(folder)
    started = []
    for spec in ENGINES:
        try:
            engine = stack.enter_context(process.running(spec, folder, logs))
            turn = EngineTurn(engine, tokenizer)
            for case in WARM_UP:
                turn(case, 0)
        except BenchError as error:
            if spec.name == KELP:
                raise
            contest.give_up(spec.name, str(error))
            reporter.say(f"({error})")
        else:
            contest.join(spec.name, turn)
            started.append(engine)
            reporter.say(f"({spec.name}: ready after {engine.load_s:.1f} s)")
    return started


def _join_bandwidth(stack: ExitStack, contest: Contest, weights_bytes: int) -> None:
    bandwidth = stack.enter_context(closing(Bandwidth()))

    def measure(case: Case, _round_number: int) -> float:
        return floor_tokens_per_s(bandwidth.bytes_per_s(), weights_bytes, case.num_sequences)

    contest.join(BANDWIDTH, measure)


def _run_cases(contest: Contest, reporter: Reporter, num_rounds: int) -> None:
    for case in CASES:
        started_s = time.monotonic()
        result = contest.run(case, contestants_of(case.name), num_rounds)
        for measurement in rows_of(result):
            reporter.add(measurement)
        reporter.say(f"({case.name}: {num_rounds} rounds in {time.monotonic() - started_s:.0f} s)")


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`."""
    folder = _model_folder()
    contest = Contest()
    with ExitStack() as stack:
        stack.enter_context(_same_cores())
        engines = {engine.name: engine for engine in _start_engines(stack, contest, reporter, folder)}
        _join_bandwidth(stack, contest, engines[KELP].weights_bytes)
        _run_cases(contest, reporter, _NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS)
        for name in (KELP, *PEERS):
            if name in engines:
                for measurement in resource_rows(engines[name]):
                    reporter.add(measurement)


SUITE = Suite(
    name="executor",
    summary="prefill and decode of the executor alone against transformers, vLLM, llama.cpp and memory bandwidth",
    required=tuple(required_rows()),
    run=run,
)
