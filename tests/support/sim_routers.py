"""Workloads and a router of few words for tests of the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kelp.core.clock import Clock
from kelp.core.errors import CapacityError
from kelp.core.kv_events import BlocksStored, KVEvent
from kelp.core.types import Role, SequenceHash, WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision, Ended, FirstToken
from kelp.sim.requests import SimRequest, Workload

BLOCK_SIZE = 16


def name_of(*path: int) -> SequenceHash:
    """A block's name."""
    return SequenceHash(bytes(np.array(path, np.int32)).ljust(16, b"\0")[-16:])


@dataclass
class TurnTaker:
    """Takes workers in turn, prefill workers as well where there are any, and writes everything down."""

    clock: Clock
    seed: int
    workers: Sequence[WorkerRecord] = ()
    num_selected: int = 0
    log: list[tuple[float, str, object]] = field(default_factory=list)
    blocks: dict[WorkerKey, set[SequenceHash]] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)

    def set_workers(self, records: Sequence[WorkerRecord]) -> None:
        self.workers = records
        self._note("workers", [record.key for record in records])

    def select(
        self, request: RoutingRequest, avoid: frozenset[WorkerKey] = frozenset(), allow_prefill: bool = True
    ) -> Decision:
        decoders = [record for record in self.workers if record.role is not Role.PREFILL and record.key not in avoid]
        prefillers = [record for record in self.workers if record.role is Role.PREFILL and record.key not in avoid]
        if not decoders:
            raise CapacityError("no worker")
        turn = self.num_selected
        self.num_selected += 1
        prefill = prefillers[turn % len(prefillers)] if prefillers else None
        return Decision(request, decoders[turn % len(decoders)], prefill)

    def reserve(self, decision: Decision) -> None:
        assert decision.request.request_id not in self.live
        self.live.add(decision.request.request_id)

    def commit(self, request_id: str) -> bool:
        return request_id in self.live

    def first_token(self, request_id: str, told: FirstToken) -> None:
        self._note("first", (request_id, told))

    def progress(self, request_id: str, num_tokens: int) -> None:
        assert request_id in self.live
        self._note("progress", (request_id, num_tokens))

    def free(self, request_id: str, ended: Ended) -> None:
        self.live.remove(request_id)
        self._note("ended", (request_id, ended))

    def apply(self, worker: WorkerKey, events: Sequence[KVEvent]) -> None:
        held = self.blocks.setdefault(worker, set())
        for event in events:
            if isinstance(event, BlocksStored):
                held.update(event.hashes)
            else:
                held.difference_update(event.hashes)

    def stats(self) -> Mapping[str, float]:
        return {"selected": self.num_selected}

    def _note(self, what: str, about: object) -> None:
        self.log.append((self.clock.monotonic_s(), what, about))


def random_workload(seed: int, num_requests: int, mean_gap_s: float = 0.05, max_output: int = 300) -> Workload:
    """Prompts of up to 30 blocks out of a few families with common beginnings, at random times."""
    rng = np.random.default_rng(seed)
    now_s, requests = 0.0, []
    for index in range(num_requests):
        now_s += float(rng.exponential(mean_gap_s))
        family, num_shared = int(rng.integers(4)), int(rng.integers(12))
        num_blocks = num_shared + int(rng.integers(1, 18))
        names = [name_of(family, i) for i in range(num_shared)]
        names += [name_of(family, num_shared, index, i) for i in range(num_shared, num_blocks)]
        num_tokens = num_blocks * BLOCK_SIZE + int(rng.integers(BLOCK_SIZE))
        requests.append(SimRequest(now_s, num_tokens, int(rng.integers(1, max_output)), tuple(names), ""))
    return Workload("random", BLOCK_SIZE, requests)
