"""The workers that a router knows, each with a slot: a small integer that indexes every per-worker array.

A slot belongs to one incarnation (id and epoch) of a worker. It is reused only after everybody who keeps arrays or
sets by slot has been told that it is free, so a new worker never inherits an old one's blocks or load. KV block
managers have a table of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from kelp.core.types import WorkerKey
from kelp.registry.base import Incarnation, WorkerRecord

SlotSink = Callable[[int], None]
RecordT = TypeVar("RecordT", bound=Incarnation)


class SlotTable(Generic[RecordT]):
    """Slots of live incarnations of one kind; belongs to one event loop."""

    def __init__(self) -> None:
        self._records: list[RecordT | None] = []
        self._slots: dict[WorkerKey, int] = {}
        self._free: list[int] = []
        self._on_joined: list[SlotSink] = []
        self._on_left: list[SlotSink] = []

    @property
    def num_slots(self) -> int:
        """One more than the highest slot ever used."""
        return len(self._records)

    def watch(self, on_joined: SlotSink, on_left: SlotSink) -> None:
        """Be told of slots that begin (the record is readable) and end (it still is)."""
        self._on_joined.append(on_joined)
        self._on_left.append(on_left)

    def slot(self, key: WorkerKey) -> int | None:
        """Slot of a live incarnation."""
        return self._slots.get(key)

    def record(self, slot: int) -> RecordT:
        """The latest record of a live slot."""
        record = self._records[slot]
        assert record is not None
        return record

    def slots(self) -> list[int]:
        """All live slots in a stable order: by id."""
        return [slot for _, slot in sorted(self._slots.items())]

    def update(self, records: Iterable[RecordT]) -> None:
        """Take the registry's latest snapshot: whoever is not in it has gone."""
        by_key = {record.key: record for record in records}
        for key in [key for key in self._slots if key not in by_key]:
            self._leave(key)
        for key, record in by_key.items():
            slot = self._slots.get(key)
            if slot is None:
                self._join(key, record)
            else:
                self._records[slot] = record

    def _join(self, key: WorkerKey, record: RecordT) -> None:
        if self._free:
            slot = self._free.pop()
            self._records[slot] = record
        else:
            slot = len(self._records)
            self._records.append(record)
        self._slots[key] = slot
        for sink in self._on_joined:
            sink(slot)

    def _leave(self, key: WorkerKey) -> None:
        slot = self._slots.pop(key)
        for sink in self._on_left:
            sink(slot)
        self._records[slot] = None
        self._free.append(slot)


class WorkerTable(SlotTable[WorkerRecord]):
    """The workers.

    Attributes:
        only_model_id: What all of them serve; empty if that is not the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.only_model_id = ""

    def update(self, records: Iterable[WorkerRecord]) -> None:
        """See `SlotTable`."""
        known = list(records)
        super().update(known)
        model_ids = {record.layout.model_id for record in known}
        self.only_model_id = model_ids.pop() if len(model_ids) == 1 else ""
