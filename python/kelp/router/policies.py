"""Which worker gets a request.

A policy sees cost records only, so that the KV-aware router fills this same interface with better numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kelp.core.types import SequenceHash
from kelp.registry.base import WorkerRecord


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy may know of a request.

    Attributes:
        num_prompt_tokens: Prompt length.
        block_hashes: Names of the prompt's full blocks, in order.
    """

    num_prompt_tokens: int
    block_hashes: tuple[SequenceHash, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker and what serving there would cost.

    Attributes:
        num_in_flight: Requests that this router has on the worker.
        num_reported: Running and waiting sequences in the worker's last heartbeat, other routers' included.
    """

    record: WorkerRecord
    num_in_flight: int

    @property
    def num_reported(self) -> int:
        """See the class docstring."""
        return self.record.num_running + self.record.num_waiting


class Policy(Protocol):
    """Chooses among candidates; called on the router's event loop alone."""

    def choose(self, candidates: Sequence[Candidate], request: RoutingRequest) -> Candidate:
        """One of `candidates`, which is never empty."""


class LeastLoaded:
    """Fewest requests, counting the own ones at once and the others' by heartbeat; ties rotate."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, candidates: Sequence[Candidate], request: RoutingRequest) -> Candidate:
        """See `Policy`."""
        load = [max(candidate.num_in_flight, candidate.num_reported) for candidate in candidates]
        least = min(load)
        tied = [candidate for candidate, count in zip(candidates, load, strict=True) if count == least]
        return tied[next(self._turn) % len(tied)]


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, candidates: Sequence[Candidate], request: RoutingRequest) -> Candidate:
        """See `Policy`."""
        return candidates[next(self._turn) % len(candidates)]


def make_policy(name: str) -> Policy:
    """The policy of a `router.policy` value."""
    policies: dict[str, Callable[[], Policy]] = {"least-loaded": LeastLoaded, "round-robin": RoundRobin}
    return policies[name]()
