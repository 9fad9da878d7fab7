"""A selector over an index that knows what a test told it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kelp.core.clock import FakeClock
from kelp.core.config import RoutingConfig
from kelp.core.kv_events import KVEvent
from kelp.core.types import Role, SequenceHash, WorkerState
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision, Ended, FirstToken, Selector, SelectorMode
from kelp.router.decision.workers import WorkerTable
from kelp.router.index.base import Matches

BLOCK_SIZE = 16


def hashes(*numbers: int) -> tuple[SequenceHash, ...]:
    """Block names."""
    return tuple(SequenceHash(number.to_bytes(16, "big")) for number in numbers)


def worker(name: str, role: Role = Role.AGGREGATED, **changes: object) -> WorkerRecord:
    """A ready worker."""
    layout = LayoutRecord(
        num_blocks=1000, num_layers=1, num_kv_heads=1, block_size=BLOCK_SIZE, head_dim=1, dtype="float32", model_id="m"
    )
    fields: dict[str, object] = {
        "worker_id": name,
        "epoch": "1",
        "model_name": f"model_{name}",
        "role": role,
        "state": WorkerState.READY,
        "endpoint": "127.0.0.1:1",
        "layout": layout,
        "max_step_tokens": 2048,
    }
    return WorkerRecord.model_validate({**fields, **changes})


@dataclass
class ToldIndex:
    """Device blocks by slot, always a prefix of the prompt; remembers what was expected and retracted."""

    blocks: dict[int, set[SequenceHash]] = field(default_factory=dict)
    tiers: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    expected: list[int] = field(default_factory=list)
    retracted: list[int] = field(default_factory=list)
    num_bytes: int = 0

    def apply(self, slot: int, event: KVEvent) -> None:
        """Not needed."""

    def clear(self, slot: int) -> None:
        """Forget."""
        self.blocks.pop(slot, None)

    def expect(self, slot: int, names: Sequence[SequenceHash]) -> None:
        """Remember."""
        self.expected.append(slot)

    def retract(self, slot: int, names: Sequence[SequenceHash]) -> None:
        """Remember."""
        self.retracted.append(slot)

    def match(self, names: Sequence[SequenceHash]) -> Matches:
        """Leading blocks of each slot, or the tiers that the test gave."""
        rows = {slot: (count,) * 4 for slot, held in self.blocks.items() if (count := _leading(names, held))}
        rows.update(self.tiers)
        blocks = np.array(list(rows.values()), np.int32).reshape(len(rows), 4)
        return Matches(np.array(list(rows), np.intp), blocks, np.zeros(len(rows), np.int32))


def _leading(names: Sequence[SequenceHash], held: set[SequenceHash]) -> int:
    count = 0
    while count < len(names) and names[count] in held:
        count += 1
    return count


class Rig:
    """A selector, what it stands on, and shortcuts."""

    def __init__(
        self, workers: Iterable[WorkerRecord], policy: str = "kelp", disaggregation: str = "auto", **config: object
    ) -> None:
        self.clock = FakeClock()
        self.table = WorkerTable()
        self.index = ToldIndex()
        mode = SelectorMode(policy, disaggregation)  # type: ignore[arg-type]
        self.selector = Selector(self.table, self.index, RoutingConfig.model_validate(config), self.clock, 7, mode)
        self.selector.set_workers(list(workers))
        self._num_requests = 0

    def request(self, num_tokens: int = 160, **changes: object) -> RoutingRequest:
        """A request with an id of its own and blocks that nobody has."""
        self._num_requests += 1
        first = self._num_requests * 10_000
        names = hashes(*range(first, first + num_tokens // BLOCK_SIZE))
        fields: dict[str, object] = {"block_hashes": names, "request_id": f"r{self._num_requests}"}
        return RoutingRequest(num_tokens, **{**fields, **changes})  # type: ignore[arg-type]

    def place(self, request: RoutingRequest | None = None) -> Decision:
        """Select, reserve, commit."""
        decision = self.selector.select(request or self.request())
        self.selector.reserve(decision)
        assert self.selector.commit(decision.request.request_id)
        return decision

    def run(self, request: RoutingRequest, prefill_s: float = 0.1, num_tokens: int = 20) -> Decision:
        """A whole life of a request that is alone."""
        decision = self.place(request)
        self.clock.advance(prefill_s)
        transfer_s = 0.01 if decision.prefill else 0.0
        self.selector.first_token(request.request_id, FirstToken(0, 0.0, prefill_s, transfer_s))
        self.selector.progress(request.request_id, num_tokens - 1)
        self.clock.advance(0.01 * num_tokens)
        self.selector.free(request.request_id, Ended(True, num_tokens, 0.01 * num_tokens))
        return decision

    def learn(self, num_requests: int = 20) -> None:
        """Let enough requests pass that predictions count."""
        for _ in range(num_requests):
            self.run(self.request(num_tokens=1600))

    def loads(self) -> np.ndarray:
        """Everything that must be zero when nothing is under way, `[num_counts, num_slots]`."""
        load = self.selector.load
        return np.array(
            [
                load.active,
                load.pending_tokens,
                load.pending_steps,
                load.pending_s,
                load.num_decoding,
                load.context_tokens,
                load.kv_tokens,
            ]
        )
