"""How far simulation itself scales: `python -m kelp.sim.scale --workers 1000 --requests 1000000`.

The workload is made as it is asked for, so that a million requests take no memory: prompts of a kilotoken, half of
which a family of requests shares, and short answers, at a rate that keeps the workers busy but not overloaded.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from kelp.core.types import SequenceHash
from kelp.sim.contestants import parse_contestant
from kelp.sim.fleet import FleetSpec
from kelp.sim.replica import routing_of
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.run import simulate

_BLOCK_SIZE = 64
_NUM_SHARED_BLOCKS = 8
_NUM_OWN_BLOCKS = 8
_NUM_OUTPUT_TOKENS = 32
_NUM_BLOCKS = 512
_RATE_PER_WORKER = 6.0
_FAMILIES_PER_WORKER = 8
_KIBIBYTE = 1024


class _Requests(Sequence[SimRequest]):
    """Requests by position, made anew each time."""

    def __init__(self, num_workers: int, num_requests: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        gaps_s = generator.exponential(1.0 / (_RATE_PER_WORKER * num_workers), num_requests)
        self._arrivals_s = np.cumsum(gaps_s)
        self._families = generator.integers(_FAMILIES_PER_WORKER * num_workers, size=num_requests)
        self._num_families = _FAMILIES_PER_WORKER * num_workers

    def __len__(self) -> int:
        return len(self._arrivals_s)

    @overload
    def __getitem__(self, index: int) -> SimRequest: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SimRequest]: ...

    def __getitem__(self, index: int | slice) -> SimRequest | Sequence[SimRequest]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        shared = _names(int(self._families[index]), _NUM_SHARED_BLOCKS)
        own = _names(self._num_families + index, _NUM_OWN_BLOCKS)
        num_tokens = (_NUM_SHARED_BLOCKS + _NUM_OWN_BLOCKS) * _BLOCK_SIZE
        return SimRequest(float(self._arrivals_s[index]), num_tokens, _NUM_OUTPUT_TOKENS, (*shared, *own))


def _names(owner: int, count: int) -> list[SequenceHash]:
    return [SequenceHash((owner << 32 | position).to_bytes(16, "little")) for position in range(count)]


@dataclass(frozen=True, slots=True)
class ScaleFigures:
    """What a run of this size took.

    Attributes:
        cpu_s: Processor time.
        max_rss_bytes: Most memory that the process has held so far.
    """

    num_workers: int
    num_requests: int
    cpu_s: float
    duration_s: float
    hit_share: float
    busy_share: float
    max_rss_bytes: int

    @property
    def us_per_request(self) -> float:
        """Processor time of one request in microseconds."""
        return self.cpu_s / self.num_requests * 1e6


def run_scale(num_workers: int, num_requests: int, policy: str = "kelp", seed: int = 0) -> ScaleFigures:
    """Simulate that many short requests on that many workers."""
    workload = Workload("scale", _BLOCK_SIZE, _Requests(num_workers, num_requests, seed))
    fleet = FleetSpec(num_workers=num_workers, num_blocks=_NUM_BLOCKS)
    result = simulate(workload, fleet, routing_of(parse_contestant(policy)), seed)
    num_tokens = num_requests * (_NUM_SHARED_BLOCKS + _NUM_OWN_BLOCKS) * _BLOCK_SIZE
    return ScaleFigures(
        num_workers=num_workers,
        num_requests=num_requests,
        cpu_s=result.cpu_s,
        duration_s=result.duration_s,
        hit_share=float(result.table.num_cached_tokens.sum()) / num_tokens,
        busy_share=float(result.busy_share.mean()),
        max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one size and print what it took."""
    parser = argparse.ArgumentParser(prog="python -m kelp.sim.scale", description=__doc__)
    parser.add_argument("--workers", type=int, default=1000, help="aggregated workers")
    parser.add_argument("--requests", type=int, default=1_000_000, help="requests in all")
    parser.add_argument("--policy", default="kelp", help="as for `kelp sim`")
    options = parser.parse_args(arguments)
    figures = run_scale(options.workers, options.requests, options.policy)
    print(
        f"{figures.num_workers} workers, {figures.num_requests} requests: {figures.cpu_s:.1f} s CPU, "
        f"{figures.us_per_request:.0f} us/request, {figures.duration_s:.0f} virtual s, "
        f"hit share {figures.hit_share:.2f}, busy {figures.busy_share:.2f}, "
        f"{figures.max_rss_bytes / _KIBIBYTE**2:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
