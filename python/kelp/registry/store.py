"""What keeps records of one kind, whatever they are about: a folder, or an etcd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from kelp.registry.base import StampedRecord

RecordT = TypeVar("RecordT", bound=StampedRecord)
NEVER_S = 3e8
"""Expiry of what is to stay: about ten years in a folder, no lease in an etcd."""


class RecordStore(Protocol[RecordT]):
    """Calls may block on I/O, and may come from several threads."""

    def write(self, name: str, record: RecordT) -> None:
        """Create or renew a record; stamps the heartbeat.

        Raises:
            OSError: The store cannot be reached.
        """

    def remove_if(self, name: str, is_it: Callable[[RecordT], bool]) -> None:
        """Remove a record if it is the one that is meant; idempotent.

        Raises:
            OSError: The store cannot be reached.
        """

    def live(self) -> list[RecordT]:
        """All live records in the order of their names.

        Raises:
            OSError: The store cannot be reached.
        """

    def sweep(self) -> int:
        """Remove the dead records and return how many there were."""
