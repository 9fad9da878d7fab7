"""One request's way back to its router, whatever carries it.

What is sent, and how what has queued up is put together, is `worker.stream`'s; a channel decides when, in which thread,
and tells the request when its router has gone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kelp.client.base import WorkerOutput
from kelp.core.errors import KelpError
from kelp.core.messages import Finished
from kelp.executor.base import Tokens

StreamItem = Tokens | Finished


@dataclass(frozen=True, slots=True)
class Source:
    """What a channel asks of the request that speaks.

    Attributes:
        merge: One response from all items queued since the last one, never called by two threads at a time.
        on_sent_last: To be called on the loop when `Finished` has gone out, or nothing can be sent any more.
    """

    merge: Callable[[list[StreamItem]], WorkerOutput]
    on_sent_last: Callable[[], None]


class Channel(Protocol):
    """Carries the responses of one request; made on the worker's loop."""

    @property
    def failure(self) -> KelpError | None:
        """Why the channel has ended the request, if it has."""

    def open(self, source: Source) -> None:
        """Who speaks; before the first `put`."""

    def put(self, item: StreamItem) -> None:
        """Queue something to say; any thread, never blocks."""

    def watching(self, cancel: Callable[[], None]) -> AbstractContextManager[None]:
        """While the block runs, call `cancel` on the loop if the router goes, or wants the request to end."""
