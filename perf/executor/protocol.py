"""What the suite and an engine's process say to each other: one JSON document a line, the engine speaks first.

    engine  Ready      once, when it is loaded
    suite   Job        then, as often as the suite likes,
    engine  Turn       what became of it

Imported by processes in environments without kelp: nothing but the standard library may be imported here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

Arrivals = tuple[tuple[float, int], ...]
"""`(time, tokens)` of everything that brought tokens of one sequence, in order; `time.monotonic()`."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The one argument of an engine's process.

    Attributes:
        threads: Threads that compute.
        num_kv_tokens: Room in the KV cache.
        num_draft_tokens: Draft tokens a step by n-gram lookup; 0 is off.
    """

    model_folder: str
    threads: int
    num_kv_tokens: int
    num_draft_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine takes jobs. `weights_bytes` is the size of the weights as they are stored."""

    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts to be generated all at once, greedily, past the end-of-sequence token."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One job done.

    Attributes:
        start_s: When it began.
        sequences: One per prompt, in order.
        peak_rss_bytes: Of the process, since it started.
    """

    start_s: float
    sequences: tuple[Arrivals, ...]
    peak_rss_bytes: int


def encode(message: EngineOptions | Ready | Job | Turn) -> str:
    """One line without the newline."""
    return json.dumps(dataclasses.asdict(message))


def decode_options(document: str) -> EngineOptions:
    """Inverse of `encode`."""
    return EngineOptions(**json.loads(document))


def decode_ready(document: str) -> Ready:
    """Inverse of `encode`."""
    return Ready(**json.loads(document))


def decode_job(document: str) -> Job:
    """Inverse of `encode`."""
    fields = json.loads(document)
    return Job(tuple(tuple(prompt) for prompt in fields["prompts"]), fields["max_tokens"])


def decode_turn(document: str) -> Turn:
    """Inverse of `encode`."""
    fields = json.loads(document)
    sequences = tuple(tuple((time_s, count) for time_s, count in arrivals) for arrivals in fields["sequences"])
    return Turn(fields["start_s"], sequences, fields["peak_rss_bytes"])


class Recorder:
    """Collects the arrivals of one job."""

    def __init__(self, num_sequences: int) -> None:
        self._arrivals: list[list[tuple[float, int]]] = [[] for _ in range(num_sequences)]

    def take(self, index: int, num_tokens: int, time_s: float) -> None:
        """Tokens of one sequence are there."""
        self._arrivals[index].append((time_s, num_tokens))

    def sequences(self) -> tuple[Arrivals, ...]:
        """Everything so far."""
        return tuple(tuple(arrivals) for arrivals in self._arrivals)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """What an engine's module has to offer: it generates a job and tells the recorder as tokens come."""

    run: Callable[[Job, Recorder], None]
    weights_bytes: int


def serve(load: Callable[[EngineOptions], LoadedEngine]) -> None:
    """The whole life of an engine's process; ends when its standard input does."""
    answers = _claim_stdout()
    engine = load(decode_options(sys.argv[1]))
    _say(answers, Ready(engine.weights_bytes))
    for job in _jobs(sys.stdin):
        recorder = Recorder(len(job.prompts))
        start_s = time.monotonic()
        engine.run(job, recorder)
        _say(answers, Turn(start_s, recorder.sequences(), peak_rss_bytes()))


def peak_rss_bytes() -> int:
    """The most physical memory that this process has held, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "VmHWM":
            return int(value.split()[0]) * 1024
    return 0


def stored_bytes(paths: Sequence[Path]) -> int:
    """Size of weight files together."""
    return sum(path.stat().st_size for path in paths)


def _jobs(stream: TextIO) -> Iterator[Job]:
    for line in stream:
        yield decode_job(line)


def _say(stream: TextIO, message: Ready | Turn) -> None:
    print(encode(message), file=stream, flush=True)


def _claim_stdout() -> TextIO:
    """Keep standard output for answers: what an engine logs there goes to standard error from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers
