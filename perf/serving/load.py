"""A load and what came of it, as they cross the pipe to the client process and back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass

from perf.machine import REPOSITORY
from perf.suite import BenchError


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A closed loop: `concurrency` requests at a time until every prompt has been sent once.

    Attributes:
        endpoint: `host:port` of Triton's gRPC service.
        timeout_s: For one request, and what the model gets as its deadline.
    """

    endpoint: str
    prompts: tuple[str, ...]
    max_tokens: int
    concurrency: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, as its client saw it.

    Attributes:
        start_s: When it was sent; all times are of the client's monotonic clock.
        arrivals: `(time, tokens)` of every response that brought tokens, in order.
        error: Empty if it ended as it should.
    """

    start_s: float
    arrivals: tuple[tuple[float, int], ...]
    num_responses: int
    num_input_tokens: int
    worker_ids: tuple[str, ...]
    error: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens received."""
        return sum(tokens for _, tokens in self.arrivals)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All answers, and the CPU time that the client process spent between the first and the last."""

    answers: tuple[Answer, ...]
    client_cpu_s: float


def encode(value: LoadSpec | LoadResult) -> str:
    """One JSON document."""
    return json.dumps(dataclasses.asdict(value))


def decode_spec(document: str) -> LoadSpec:
    """Inverse of `encode`."""
    fields = json.loads(document)
    return LoadSpec(**{**fields, "prompts": tuple(fields["prompts"])})


def decode_result(document: str) -> LoadResult:
    """Inverse of `encode`."""
    fields = json.loads(document)
    return LoadResult(tuple(_decode_answer(answer) for answer in fields["answers"]), fields["client_cpu_s"])


def _decode_answer(fields: dict[str, object]) -> Answer:
    arrivals, worker_ids = fields["arrivals"], fields["worker_ids"]
    assert isinstance(arrivals, list) and isinstance(worker_ids, list)
    changes = {"arrivals": tuple((time_s, tokens) for time_s, tokens in arrivals), "worker_ids": tuple(worker_ids)}
    return Answer(**{**fields, **changes})  # type: ignore[arg-type]


def run_load(spec: LoadSpec) -> LoadResult:
    """Run a load in a process of its own, so that the client's CPU time is told apart.

    Raises:
        BenchError: The client process failed as a whole.
    """
    waves = -(-len(spec.prompts) // spec.concurrency)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "perf.serving.client"],
            input=encode(spec),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=spec.timeout_s * waves + 60.0,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"load client: silent for {spec.timeout_s * waves + 60.0:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BenchError(f"load client: exit status {done.returncode}: {reason[:300]}")
    return decode_result(done.stdout)
