"""The suite's side of an engine's process.

An engine is stopped by signal except while it does a job: some spin for a while when they are idle, and what they burn
would be missing from the others' figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perf.executor.engines import EngineSpec
from perf.executor.protocol import Job, Turn, decode_ready, decode_turn, encode
from perf.machine import REPOSITORY
from perf.suite import BenchError

_JOB_TIMEOUT_S = 240.0
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_CHARACTERS = 300


def _die_with_parent() -> None:
    # KILL reaches a stopped process too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(spec: EngineSpec, model_folder: Path, log: Path) -> subprocess.Popen[str]:
    command = [str(spec.python()), "-m", spec.module, encode(spec.options(model_folder))]
    with log.open("w") as errors:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **spec.environment()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


class EngineProcess:
    """One engine, loaded, and stopped unless it does a job.

    Attributes:
        load_s: From starting the process until it took jobs, imports included.
        weights_bytes: See `protocol.Ready`.
        peak_rss_bytes: As of the last job.
    """

    def __init__(self, spec: EngineSpec, process: subprocess.Popen[str], log: Path) -> None:
        self.name = spec.name
        self.pid = process.pid
        self.peak_rss_bytes = 0
        self._process = process
        self._log = log
        started_s = time.monotonic()
        self.weights_bytes = decode_ready(self._read(spec.start_timeout_s)).weights_bytes
        self.load_s = time.monotonic() - started_s
        self._signal(signal.SIGSTOP)

    def run(self, job: Job) -> Turn:
        """Let it do a job while all others are stopped.

        Raises:
            BenchError: It died, quoting its last words, is silent for too long, or gave too few tokens.
        """
        self._signal(signal.SIGCONT)
        try:
            self._write(encode(job))
            turn = decode_turn(self._read(_JOB_TIMEOUT_S))
        finally:
            self._signal(signal.SIGSTOP)
        self.peak_rss_bytes = turn.peak_rss_bytes
        for arrivals in turn.sequences:
            num_tokens = sum(count for _, count in arrivals)
            if num_tokens != job.max_tokens:
                raise BenchError(f"{self.name}: {num_tokens} of {job.max_tokens} tokens came")
        return turn

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(self._last_words()) from None

    def _read(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        # One answer is in flight at a time, so nothing readable ever hides in the buffer of the pipe.
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not readable:
            raise BenchError(f"{self.name}: silent for {timeout_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(self._last_words())
        return line

    def _signal(self, number: signal.Signals) -> None:
        # The whole session: an engine may have processes of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self.name}: {(lines or ['no output'])[-1].strip()[:_LAST_WORDS_CHARACTERS]}"


@contextmanager
def running(spec: EngineSpec, model_folder: Path, logs: Path) -> Iterator[EngineProcess]:
    """Keep an engine while the block runs.

    Raises:
        BenchError: It is not installed or does not come up; quotes its last words.
    """
    log = logs / f"{spec.module}-{spec.num_draft_tokens}.log"
    process = _start(spec, model_folder, log)
    try:
        yield EngineProcess(spec, process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            process.communicate()
