"""What is on its way to each worker: counts by slot, and one entry per request and worker that explains them.

Reservations lapse, committed entries are leases that signs of life renew, on a worker that is missing from the
registry as on any other: should the same incarnation return, what it still has counts again. A worker's heartbeat
corrects the counts only by what neither own nor replicated requests explain, those that ended since the heartbeat
before included: a heartbeat is old when it comes, and whoever trusts it more than what he sent himself herds everything
to one worker.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from kelp.core.types import WorkerKey
from kelp.timing.rates import Work

Counts = npt.NDArray[np.float64]

_GONE = -1
_NUM_COUNTS = 14
_SWEEPS_PER_LEASE = 8


@dataclass(slots=True, eq=False)
class Entry:
    """One request on one worker.

    Attributes:
        key: Names the request.
        slot: Where it runs; -1 while that worker is gone, and once it has ended.
        kv_tokens: Tokens of KV that it holds there.
        work: The prompt's computation there; None if it computes none.
        work_s: Predicted seconds of it.
        now_s: When it was reserved; later the last sign of life.
        is_committed: Whether it was sent.
        is_pending: Whether its prompt is still to be computed there.
        is_decoding: Whether it generates there.
        away: All entries of its worker, while that one is gone.
    """

    key: str
    slot: int
    kv_tokens: float
    work: Work | None
    work_s: float
    now_s: float
    is_committed: bool = False
    is_pending: bool = False
    is_decoding: bool = False
    away: dict[str, Entry] | None = None


class Load:
    """Counts by slot; each array is `[num_slots] float64`, read by others, written here alone.

    Attributes:
        active: Requests, own and replicated.
        num_pending: Prompts still to be computed.
        pending_tokens: Tokens of those.
        pending_steps: Steps that those take.
        pending_s: Seconds that those take, predicted one by one.
        head_s: The part of `pending_s` that the request at the head of the queue accounts for.
        head_since_s: When that one got there.
        num_decoding: Sequences that generate.
        context_tokens: Their KV.
        kv_tokens: KV of all active requests.
        foreign: Requests that only the worker's heartbeat tells of.
        placed_tokens: Prompt tokens ever sent there to be computed.
    """

    def __init__(self, reservation_ttl_s: float, lease_ttl_s: float) -> None:
        self._reservation_ttl_s = reservation_ttl_s
        self._lease_ttl_s = lease_ttl_s
        self._reserved: deque[tuple[float, Entry]] = deque()
        self._on: list[dict[str, Entry]] = []
        self._queues: list[dict[str, Entry]] = []
        self._away: dict[WorkerKey, dict[str, Entry]] = {}
        self._next_sweep_s = 0.0
        self._use(np.zeros((_NUM_COUNTS, 0)))

    def _use(self, counts: Counts) -> None:
        self._counts = counts
        self.active: Counts = counts[0]
        self.pending_tokens: Counts = counts[1]
        self.pending_steps: Counts = counts[2]
        self.pending_s: Counts = counts[3]
        self.head_s: Counts = counts[4]
        self.head_since_s: Counts = counts[5]
        self.num_decoding: Counts = counts[6]
        self.context_tokens: Counts = counts[7]
        self.kv_tokens: Counts = counts[8]
        self.foreign: Counts = counts[9]
        self.placed_tokens: Counts = counts[10]
        self._ended: Counts = counts[11]
        self._ended_before: Counts = counts[12]
        self.num_pending: Counts = counts[13]

    def begin(self, slot: int, key: WorkerKey) -> list[Entry]:
        """This incarnation has the slot now.

        Returns:
            What it had when it left and still has, which counts again.
        """
        missing = slot + 1 - self._counts.shape[1]
        if missing > 0:
            self._use(np.concatenate([self._counts, np.zeros((_NUM_COUNTS, missing))], axis=1))
            self._on.extend({} for _ in range(missing))
            self._queues.extend({} for _ in range(missing))
        returned = list(self._away.pop(key, {}).values())
        for entry in returned:
            self._return(slot, entry)
        return returned

    def end(self, slot: int, key: WorkerKey) -> None:
        """The worker has gone; what it had counts nowhere, but is kept for as long as it would have counted there."""
        entries = self._on[slot]
        for entry in entries.values():
            entry.slot, entry.away = _GONE, entries
        if entries:
            self._away[key] = entries
        self._on[slot] = {}
        self._queues[slot].clear()
        self._counts[:, slot] = 0.0

    def hear(self, slot: int, num_reported: int) -> None:
        """A new heartbeat says that so many requests run or wait there."""
        explained = self.active[slot] + self._ended[slot] + self._ended_before[slot]
        self.foreign[slot] = max(0.0, num_reported - explained)
        self._ended_before[slot] = self._ended[slot]
        self._ended[slot] = 0.0

    def add(self, entry: Entry) -> None:
        """Count a new entry; an uncommitted one lapses unless it is committed in time."""
        slot = entry.slot
        self._on[slot][entry.key] = entry
        self.active[slot] += 1
        self.kv_tokens[slot] += entry.kv_tokens
        if not entry.is_committed:
            self._reserved.append((entry.now_s + self._reservation_ttl_s, entry))
        if entry.work is not None:
            self._queue(entry, entry.work)

    def prefilled(self, entry: Entry, now_s: float) -> None:
        """Its prompt has been computed."""
        entry.now_s = now_s
        if entry.is_pending:
            entry.is_pending = False
            if entry.slot != _GONE:
                self._unqueue(entry, now_s)

    def decoding(self, entry: Entry, now_s: float) -> None:
        """It generates from now on."""
        entry.now_s = now_s
        if not entry.is_decoding:
            entry.is_decoding = True
            if entry.slot != _GONE:
                self.num_decoding[entry.slot] += 1
                self.context_tokens[entry.slot] += entry.kv_tokens

    def grow(self, entry: Entry, num_tokens: int, now_s: float) -> None:
        """So many tokens came."""
        entry.now_s = now_s
        entry.kv_tokens += num_tokens
        if entry.slot != _GONE:
            self.kv_tokens[entry.slot] += num_tokens
            if entry.is_decoding:
                self.context_tokens[entry.slot] += num_tokens

    def remove(self, entry: Entry, now_s: float) -> None:
        """It has ended; idempotent."""
        slot = entry.slot
        if slot == _GONE:
            if entry.away is not None:
                entry.away.pop(entry.key, None)
                entry.away = None
            return
        if entry.is_pending:
            entry.is_pending = False
            self._unqueue(entry, now_s)
        if entry.is_decoding:
            self.num_decoding[slot] -= 1
            self.context_tokens[slot] -= entry.kv_tokens
        self.active[slot] -= 1
        self.kv_tokens[slot] -= entry.kv_tokens
        self._ended[slot] += 1
        self._on[slot].pop(entry.key, None)
        entry.slot = _GONE

    def lapsed(self, now_s: float) -> list[Entry]:
        """Entries whose reservation or lease is over; the caller removes them."""
        gone = []
        while self._reserved and self._reserved[0][0] <= now_s:
            entry = self._reserved.popleft()[1]
            if not entry.is_committed and (entry.slot != _GONE or entry.away is not None):
                gone.append(entry)
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + self._lease_ttl_s / _SWEEPS_PER_LEASE
            oldest_s = now_s - self._lease_ttl_s
            self._away = {key: entries for key, entries in self._away.items() if entries}
            held = chain(self._on, self._away.values())
            gone.extend(entry for entries in held for entry in entries.values() if entry.now_s < oldest_s)
        return gone

    def _return(self, slot: int, entry: Entry) -> None:
        entry.slot, entry.away = slot, None
        self._on[slot][entry.key] = entry
        self.active[slot] += 1
        self.kv_tokens[slot] += entry.kv_tokens
        if entry.is_pending:
            assert entry.work is not None
            self._queue(entry, entry.work)
        if entry.is_decoding:
            self.num_decoding[slot] += 1
            self.context_tokens[slot] += entry.kv_tokens

    def _queue(self, entry: Entry, work: Work) -> None:
        slot = entry.slot
        queue = self._queues[slot]
        if not queue:
            self.head_s[slot] = entry.work_s
            self.head_since_s[slot] = entry.now_s
        queue[entry.key] = entry
        entry.is_pending = True
        self.num_pending[slot] += 1
        self.pending_tokens[slot] += work.tokens
        self.pending_steps[slot] += work.steps
        self.pending_s[slot] += entry.work_s
        self.placed_tokens[slot] += work.tokens

    def _unqueue(self, entry: Entry, now_s: float) -> None:
        slot = entry.slot
        queue = self._queues[slot]
        queue.pop(entry.key, None)
        self.num_pending[slot] -= 1
        if not queue:
            self._counts[1:5, slot] = 0.0
            return
        assert entry.work is not None
        self.pending_tokens[slot] -= entry.work.tokens
        self.pending_steps[slot] -= entry.work.steps
        self.pending_s[slot] -= entry.work_s
        self.head_s[slot] = next(iter(queue.values())).work_s
        self.head_since_s[slot] = now_s
