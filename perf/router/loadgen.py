"""The load generator: a process that reads a LoadSpec on stdin and writes a LoadResult on stdout.

One epoll loop in one thread, for both protocols alike. Loopback only, bounded in count and in time.
"""

from __future__ import annotations

import dataclasses
import gc
import ipaddress
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from perf.machine import REPOSITORY
from perf.router.loadgen_connection import Answer, Connection
from perf.router.loadgen_protocols import PROTOCOLS, encode_request
from perf.suite import BenchError


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A closed loop: `concurrency` requests at a time until every prompt has been sent once.

    Attributes:
        protocol: A key of `loadgen_protocols.PROTOCOLS`.
        model: What the protocol calls the model, where it does.
        is_quick_ack: See `Connection`.
        timeout_s: Silence of all connections for this long ends the run.
    """

    protocol: str
    host: str
    port: int
    model: str
    prompts: tuple[str, ...]
    max_tokens: int
    concurrency: int
    is_quick_ack: bool
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All answers, and what the run took.

    Attributes:
        client_cpu_s: Of the load generator itself.
    """

    answers: tuple[Answer, ...]
    wall_s: float
    client_cpu_s: float


class ClosedLoop:
    """Keeps `concurrency` requests in flight."""

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._protocol = PROTOCOLS[spec.protocol]
        self._requests: Iterator[bytes] = iter(
            [
                encode_request(self._protocol, spec.host, self._protocol.document(spec.model, prompt, spec.max_tokens))
                for prompt in spec.prompts
            ]
        )
        self._poll = select.epoll()
        self._open: dict[int, Connection] = {}
        self._answers: list[Answer] = []

    def run(self) -> LoadResult:
        """Send everything and wait for the answers."""
        connections = [self._connect() for _ in range(self._spec.concurrency)]
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for connection in connections:
            self._ask_next(connection)
        while self._open:
            ready = self._poll.poll(self._spec.timeout_s)
            if not ready:
                self._give_up()
            for descriptor, _ in ready:
                self._read(self._open[descriptor])
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        return LoadResult(tuple(self._answers), wall_s, cpu_s)

    def _connect(self) -> Connection:
        return Connection(self._spec.host, self._spec.port, self._protocol, self._spec.is_quick_ack)

    def _ask_next(self, connection: Connection) -> None:
        request = next(self._requests, None)
        if request is None:
            self._leave(connection)
            return
        if connection.fileno() not in self._open:
            self._open[connection.fileno()] = connection
            self._poll.register(connection.fileno(), select.EPOLLIN)
        connection.ask(request)

    def _read(self, connection: Connection) -> None:
        try:
            answer = connection.read()
        except OSError as error:
            self._answers.append(connection.failed(f"{type(error).__name__}: {error}"))
            self._leave(connection)
            self._ask_next(self._connect())
            return
        if answer is not None:
            self._answers.append(self._checked(answer))
            self._ask_next(connection)

    def _checked(self, answer: Answer) -> Answer:
        if answer.error or answer.num_output_tokens == self._spec.max_tokens:
            return answer
        return dataclasses.replace(answer, error=f"{answer.num_output_tokens} of {self._spec.max_tokens} tokens came")

    def _leave(self, connection: Connection) -> None:
        if self._open.pop(connection.fileno(), None) is not None:
            self._poll.unregister(connection.fileno())
        connection.close()

    def _give_up(self) -> None:
        for connection in list(self._open.values()):
            self._answers.append(connection.failed(f"silent for {self._spec.timeout_s:.0f} s"))
            self._leave(connection)


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
    return LoadResult(**{**fields, "answers": tuple(Answer(**answer) for answer in fields["answers"])})


def run_load(spec: LoadSpec) -> LoadResult:
    """Run a load in a process of its own, so that the client's CPU time is told apart.

    Raises:
        BenchError: The process failed as a whole, or the address is not a loopback one.
    """
    if not ipaddress.ip_address(spec.host).is_loopback:
        raise BenchError(f"{spec.host}: load goes to loopback addresses only")
    limit_s = 60.0 + 2.0 * spec.timeout_s
    try:
        done = subprocess.run(
            [sys.executable, "-m", "perf.router.loadgen"],
            input=encode(spec),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"load generator: not done after {limit_s:.0f} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BenchError(f"load generator: exit status {done.returncode}: {reason[:300]}")
    return decode_result(done.stdout)


def main() -> None:
    """Entry point."""
    spec = decode_spec(sys.stdin.read())
    # A collection in the middle of a burst would show up as the server's latency.
    gc.disable()
    print(encode(ClosedLoop(spec).run()))


if __name__ == "__main__":
    main()
