"""Steps that the device has been given and whose tokens the host does not have yet.

While one step runs the next is planned and launched; the device takes them in order. A sequence's blocks stay its own
as long as it takes part in a flight, whatever has become of its request meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass

from kelp.executor.batching.batch import Chunk, Launched, ModelRunner, Sampled
from kelp.executor.batching.scheduler import Work
from kelp.executor.batching.sequence import Sequence

MAX_IN_FLIGHT = 2
"""A chunk can take its token from the launch before it, not from earlier ones."""


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a flight."""

    sequence: Sequence
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Flight:
    """One launched step."""

    launched: Launched
    parts: tuple[Part, ...]


class Flights:
    """All launched steps of one engine, oldest first."""

    def __init__(self, runner: ModelRunner, max_in_flight: int) -> None:
        assert 1 <= max_in_flight <= MAX_IN_FLIGHT
        self._runner = runner
        self._max_in_flight = max_in_flight
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        """Launched steps that have not landed."""
        return len(self._flights)

    @property
    def is_full(self) -> bool:
        """Whether the oldest must land before another launch."""
        return len(self._flights) >= self._max_in_flight

    def launch(self, work: Many[Work[Sequence]]) -> None:
        """Give the device one more step.

        Raises:
            Exception: Whatever the runner raises; the sequences are as free as after a landing.
        """
        parts: list[Part] = []
        num_samples = 0
        for item in work:
            chunk = item.sequence.launch(item.num_tokens, item.num_drafts, num_samples)
            parts.append(Part(item.sequence, chunk))
            num_samples += len(chunk.samples)
        try:
            launched = self._runner.launch([part.chunk for part in parts])
        except BaseException:
            _disembark(parts)
            raise
        self._flights.append(Flight(launched, tuple(parts)))

    def land(self) -> tuple[Flight, list[Sampled]]:
        """Wait for the oldest step; what it says of sequences that ended meanwhile means nothing.

        Raises:
            Exception: Whatever the runner raises; the flight is over all the same.
        """
        flight = self._flights.popleft()
        try:
            return flight, flight.launched.result()
        finally:
            _disembark(flight.parts)


def _disembark(parts: Many[Part]) -> None:
    for part in parts:
        part.sequence.num_flights -= 1
