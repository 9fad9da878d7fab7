"""A workload's halves and load levels, as views: nothing is copied, so a million requests may stay lazy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from kelp.core.errors import ConfigError
from kelp.sim.requests import SimRequest, Workload


class _View(Sequence[SimRequest]):
    """Requests `[start, stop)` of others, played `speed` times as fast, the first at 0."""

    def __init__(self, base: Sequence[SimRequest], start: int, stop: int, speed: float) -> None:
        self._base = base
        self._start = start
        self._stop = stop
        self._speed = speed
        self._first_s = base[start].arrival_s if start < stop else 0.0

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> SimRequest: ...

    @overload
    def __getitem__(self, index: slice) -> list[SimRequest]: ...

    def __getitem__(self, index: int | slice) -> SimRequest | list[SimRequest]:
        positions = range(self._start, self._stop)[index]
        return self._at(positions) if isinstance(positions, int) else [self._at(position) for position in positions]

    def __iter__(self) -> Iterator[SimRequest]:
        return map(self._at, range(self._start, self._stop))

    def _at(self, position: int) -> SimRequest:
        request = self._base[position]
        return SimRequest(
            (request.arrival_s - self._first_s) / self._speed,
            request.num_prompt_tokens,
            request.num_output_tokens,
            request.block_hashes,
            request.session_id,
        )


def span_s(workload: Workload) -> float:
    """First arrival to last."""
    return workload.requests[-1].arrival_s - workload.requests[0].arrival_s if workload.requests else 0.0


def rate_rps(workload: Workload) -> float:
    """Mean arrival rate; infinite where all come at once."""
    seconds = span_s(workload)
    return len(workload.requests) / seconds if seconds > 0 else float("inf")


def at_speed(workload: Workload, speed: float) -> Workload:
    """The same requests `speed` times as fast, think times included.

    Raises:
        ConfigError: `speed` is not positive.
    """
    if not 0 < speed < float("inf"):
        raise ConfigError(f"speed {speed}: must be positive")
    requests = workload.requests
    return Workload(workload.name, workload.block_size, _View(requests, 0, len(requests), speed))


def at_rate(workload: Workload, rate: float) -> Workload:
    """The same requests at a mean of `rate` requests/s.

    Raises:
        ConfigError: `rate` is not positive, or the workload comes all at once.
    """
    if not 0 < rate < float("inf"):
        raise ConfigError(f"--rate {rate}: must be positive")
    if span_s(workload) <= 0:
        raise ConfigError(f"--rate {rate}: {workload.name} has all its arrivals at one instant")
    return at_speed(workload, rate / rate_rps(workload))


def part_of(workload: Workload, first: float, last: float) -> Workload:
    """Requests between two shares (0..1) of the workload by count; it starts with cold caches."""
    num_requests = len(workload.requests)
    start, stop = round(num_requests * first), round(num_requests * last)
    return Workload(workload.name, workload.block_size, _View(workload.requests, start, stop, 1.0))


def halves(workload: Workload) -> tuple[Workload, Workload]:
    """First half, for tuning, and second, for reporting."""
    return part_of(workload, 0.0, 0.5), part_of(workload, 0.5, 1.0)
