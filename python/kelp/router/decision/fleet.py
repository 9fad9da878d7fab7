"""What workers say of themselves, as arrays by slot, and who may serve in which role."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kelp.core.types import Role, WorkerState
from kelp.registry.base import WorkerRecord
from kelp.router.decision.workers import WorkerTable

Slots = npt.NDArray[np.intp]

_DEFAULT_STEP_TOKENS = 2048
_UNLIMITED = 2**31


class Candidates(NamedTuple):
    """Workers to choose from.

    Attributes:
        slots: `[n] intp`, ascending.
        at: Selects them from an array by slot; a slice where they are all slots, which saves the copies.
    """

    slots: Slots
    at: Slots | slice

    @classmethod
    def of(cls, slots: Slots, num_slots: int) -> Candidates:
        """Candidates at these slots."""
        return cls(slots, slice(0, num_slots) if len(slots) == num_slots else slots)


class Fleet:
    """Static figures of the workers in a table, and its ready workers by role.

    Attributes:
        block_size: `[num_slots]`, tokens.
        num_blocks: `[num_slots]`, KV pool.
        step_tokens: `[num_slots]`, token budget of one step.
        max_running: `[num_slots]`, sequences at once.
        worker_ids: By slot; replaced, never changed.
        decoders: Ready workers that can generate.
        prefillers: Ready workers that only prefill.
    """

    def __init__(self, table: WorkerTable) -> None:
        self._table = table
        self.block_size = np.zeros(0)
        self.num_blocks = np.zeros(0)
        self.step_tokens = np.zeros(0)
        self.max_running = np.zeros(0)
        self.worker_ids: tuple[str, ...] = ()
        self.decoders = Candidates.of(np.zeros(0, np.intp), 0)
        self.prefillers = self.decoders

    def refresh(self) -> None:
        """The table has changed: read it again."""
        live = sorted(self._table.slots())
        ready = [slot for slot in live if self._table.record(slot).state is WorkerState.READY]
        num_slots = self._table.num_slots
        roles = {slot: self._table.record(slot).role for slot in ready}
        self.decoders = _candidates([slot for slot in ready if roles[slot] is not Role.PREFILL], num_slots)
        self.prefillers = _candidates([slot for slot in ready if roles[slot] is Role.PREFILL], num_slots)
        ids = {slot: self._table.record(slot).worker_id for slot in live}
        worker_ids = tuple(ids.get(slot, "") for slot in range(num_slots))
        # Explained decisions keep what they find here, so it had better stay the same object.
        if worker_ids != self.worker_ids:
            self.worker_ids = worker_ids
        self.block_size = self._column(live, lambda record: record.layout.block_size)
        self.num_blocks = self._column(live, lambda record: record.layout.num_blocks)
        self.step_tokens = self._column(live, lambda record: record.max_step_tokens or _DEFAULT_STEP_TOKENS)
        self.max_running = self._column(live, lambda record: record.max_running or _UNLIMITED)

    def _column(self, live: list[int], value: Callable[[WorkerRecord], int]) -> npt.NDArray[np.float64]:
        column = np.ones(self._table.num_slots)
        for slot in live:
            column[slot] = value(self._table.record(slot))
        return column


def _candidates(slots: list[int], num_slots: int) -> Candidates:
    return Candidates.of(np.array(slots, np.intp), num_slots)
