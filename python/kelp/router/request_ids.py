"""Names of decisions: the client's id of a request where it gave one, so that it can ask why later."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_CHARS = 256


class RequestIds:
    """Ids of live requests; belongs to one event loop.

    Clients may give one id to several requests: while one of them runs, others get an ending of their own.
    """

    def __init__(self) -> None:
        self._live: set[str] = set()

    @contextmanager
    def named(self, client_id: str) -> Iterator[str]:
        """A name that no other live request has, while the block runs."""
        name = client_id[:_MAX_CHARS] or uuid.uuid4().hex
        if name in self._live:
            name = f"{name}.{uuid.uuid4().hex[:8]}"
        self._live.add(name)
        try:
            yield name
        finally:
            self._live.remove(name)
