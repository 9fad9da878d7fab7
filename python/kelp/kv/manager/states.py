"""The life of a place for one block, and who holds it.

    FREE      its content means nothing
    FILLING   a READ, a promotion or a write puts bytes into it
    STORED    the bytes of a worker that has not yet said that it held them still
    RESIDENT  a block that can be found by its name
    DOOMED    nobody finds it any more, but somebody still reads it
    WIPING    its bytes are being overwritten

References keep a block from leaving: those of leases and of background moves. Bookkeeping only: knows no names.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable

from kelp.core.errors import InternalError


class SlotState(enum.Enum):
    """See the module docstring."""

    FREE = "free"
    FILLING = "filling"
    STORED = "stored"
    RESIDENT = "resident"
    DOOMED = "doomed"
    WIPING = "wiping"


MOVES: dict[SlotState, frozenset[SlotState]] = {
    SlotState.FREE: frozenset({SlotState.FILLING, SlotState.RESIDENT, SlotState.WIPING}),
    SlotState.FILLING: frozenset({SlotState.STORED, SlotState.RESIDENT, SlotState.FREE, SlotState.WIPING}),
    SlotState.STORED: frozenset({SlotState.RESIDENT, SlotState.FREE, SlotState.WIPING}),
    SlotState.RESIDENT: frozenset({SlotState.FREE, SlotState.DOOMED, SlotState.WIPING}),
    SlotState.DOOMED: frozenset({SlotState.FREE, SlotState.WIPING}),
    SlotState.WIPING: frozenset({SlotState.FREE}),
}
"""FREE to RESIDENT is what an earlier process left in place."""


class SlotTable:
    """States and references of `num_slots` places."""

    def __init__(self, num_slots: int) -> None:
        self._states = [SlotState.FREE] * num_slots
        self._references = [0] * num_slots
        self._free: deque[int] = deque(range(num_slots))
        self._counts = dict.fromkeys(SlotState, 0)
        self._counts[SlotState.FREE] = num_slots

    def __len__(self) -> int:
        """Places in all."""
        return len(self._states)

    def state(self, slot: int) -> SlotState:
        """Where a place is in its life."""
        return self._states[slot]

    def count(self, state: SlotState) -> int:
        """Places in one state."""
        return self._counts[state]

    def in_state(self, state: SlotState) -> Iterable[int]:
        """All places in one state; walks through the table."""
        return [slot for slot, known in enumerate(self._states) if known is state]

    def take(self) -> int | None:
        """A free place, now FILLING; None without one."""
        while self._free:
            # Places that were taken by number are still in the queue.
            slot = self._free.popleft()
            if self._states[slot] is SlotState.FREE:
                self.move(slot, SlotState.FILLING)
                return slot
        return None

    def retake(self, slot: int) -> int:
        """Take the place that has just become free, now FILLING."""
        assert self._free[-1] == slot
        self._free.pop()
        self.move(slot, SlotState.FILLING)
        return slot

    def move(self, slot: int, state: SlotState) -> None:
        """Change a state.

        Raises:
            InternalError: The table of moves forbids it, or a held place would become free.
        """
        before = self._states[slot]
        if state not in MOVES[before]:
            raise InternalError(f"KV slot {slot}: {before.value} cannot become {state.value}")
        if self._references[slot] and state in (SlotState.FREE, SlotState.WIPING):
            raise InternalError(f"KV slot {slot}: {self._references[slot]} references, cannot become {state.value}")
        self._states[slot] = state
        self._counts[before] -= 1
        self._counts[state] += 1
        if state is SlotState.FREE:
            self._free.append(slot)

    def hold(self, slot: int) -> None:
        """Add a reference.

        Raises:
            InternalError: Nothing is there to be held.
        """
        if self._states[slot] is not SlotState.RESIDENT:
            raise InternalError(f"KV slot {slot}: {self._states[slot].value}, cannot be held")
        self._references[slot] += 1

    def release(self, slot: int) -> bool:
        """Give a reference back; whether it was the last.

        Raises:
            InternalError: Nobody holds it.
        """
        if not self._references[slot]:
            raise InternalError(f"KV slot {slot}: released without a reference")
        self._references[slot] -= 1
        return self._references[slot] == 0

    def references(self, slot: int) -> int:
        """References on a place."""
        return self._references[slot]

    @property
    def num_references(self) -> int:
        """References on all places."""
        return sum(self._references)

    def check_integrity(self) -> None:
        """Verify the counts and the free list; for tests.

        Raises:
            InternalError: They contradict the states.
        """
        for state in SlotState:
            if self._counts[state] != self._states.count(state):
                raise InternalError(f"KV slots: {self._counts[state]} counted as {state.value}")
        free = {slot for slot in self._free if self._states[slot] is SlotState.FREE}
        if len(free) != self._counts[SlotState.FREE]:
            raise InternalError("KV slots: a free place is in no list")
        for slot, references in enumerate(self._references):
            if references and self._states[slot] not in (SlotState.RESIDENT, SlotState.DOOMED):
                raise InternalError(f"KV slot {slot}: {self._states[slot].value} with {references} references")
