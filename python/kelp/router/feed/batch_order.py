"""Puts numbered batches in order, with those waiting that came before their turn; bounded."""

from __future__ import annotations

from kelp.router.feed.values import Batch


class BatchOrder:
    """Batches from `next_seq` on; before the first number is known nothing is handed out.

    Attributes:
        next_seq: What `pop` hands out next; None if it is not known where to begin.
    """

    def __init__(self, max_waiting: int) -> None:
        self.next_seq: int | None = None
        self._max_waiting = max_waiting
        self._waiting: dict[int, Batch] = {}
        self._highest = -1
        self._last_ts = float("-inf")

    @property
    def is_behind(self) -> bool:
        """Whether a batch is known to exist that has not been handed out."""
        return self.next_seq is not None and self._highest >= self.next_seq

    @property
    def last_run(self) -> int:
        """Where the last batches without a gap begin; behind everything known if the last one itself is missing."""
        start = max(self._waiting, default=-1)
        if start < self._highest:
            return self._highest + 1
        while start - 1 in self._waiting:
            start -= 1
        return start

    def is_restart(self, batch: Batch) -> bool:
        """Foreign engines have no epochs: an old number with a new time comes from a new process."""
        if not batch.is_foreign or self.next_seq is None or batch.events is None:
            return False
        return batch.seq < self.next_seq and batch.ts > self._last_ts

    def hear_of(self, seq: int) -> None:
        """There is a batch of this number."""
        self._highest = max(self._highest, seq)

    def put(self, batch: Batch) -> None:
        """A batch came; ignored if it was handed out, forgotten for now if too many wait."""
        if self.next_seq is not None and batch.seq < self.next_seq:
            return
        self.hear_of(batch.seq)
        if len(self._waiting) < self._max_waiting or batch.seq == self.next_seq:
            self._waiting.setdefault(batch.seq, batch)

    def pop(self) -> Batch | None:
        """The next batch in order, if it is here."""
        if self.next_seq is None:
            return None
        batch = self._waiting.pop(self.next_seq, None)
        if batch is not None:
            self.next_seq += 1
            self._last_ts = max(self._last_ts, batch.ts)
        return batch

    def go_on_at(self, seq: int) -> None:
        """Everything before `seq` is settled, and what came from much later was never true; 0 starts over."""
        self.next_seq = seq
        if not seq:
            self._last_ts = float("-inf")
        horizon = seq + self._max_waiting
        self._waiting = {kept: batch for kept, batch in self._waiting.items() if seq <= kept < horizon}
        self._highest = max(self._waiting, default=seq - 1)

    def clear(self) -> None:
        """Nothing is known any more."""
        self._waiting.clear()
        self._highest = -1
        self._last_ts = float("-inf")
        self.next_seq = None
