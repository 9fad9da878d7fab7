"""What the index bench and the process of an index say to each other: one JSON document a line, command then answer.

Imported by a process in an environment without kelp: nothing but the standard library may be imported here.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from perf.router.index_workload import History, IndexCase, make_history

_MIN_MATCH_S = 0.02


class Contender(Protocol):
    """One index, with everything it is fed already in its own form, so that only its own work is timed."""

    def prepare(self, history: History) -> None:
        """Encode events and queries."""

    def ingest(self) -> None:
        """Start empty and take all events, from wire bytes."""

    def match(self, length: int) -> None:
        """Look all queries of a length up."""

    def answers(self, length: int) -> list[dict[int, int]]:
        """The same queries: leading blocks by worker."""


def rss_bytes() -> int:
    """Physical memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _seconds(work: Callable[[], None]) -> float:
    # Processor time: with one core to itself it is the wall time, and neighbours do not count.
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


def _match_rate(contender: Contender, history: History, length: int) -> float:
    spent_s = 0.0
    num_queries = 0
    while spent_s < _MIN_MATCH_S:
        spent_s += _seconds(lambda: contender.match(length))
        num_queries += len(history.queries[length])
    return num_queries / spent_s


def _digest(answers: Sequence[dict[int, int]]) -> str:
    return hashlib.sha256(json.dumps([sorted(answer.items()) for answer in answers]).encode()).hexdigest()


def serve(contender: Contender) -> None:
    """The whole life of the process of an index; ends when its standard input does."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    history: History | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if history is None or command["do"] == "load":
            history = make_history(IndexCase(**command["case"]))
            contender.prepare(history)
            answer: object = history.num_blocks
        elif command["do"] == "ingest":
            gc.collect()
            before_bytes = rss_bytes()
            rate = history.num_blocks / _seconds(contender.ingest)
            answer = [rate, rss_bytes() - before_bytes]
        elif command["do"] == "match":
            answer = _match_rate(contender, history, command["length"])
        else:
            answer = _digest(contender.answers(command["length"]))
        print(json.dumps(answer), file=answers, flush=True)
