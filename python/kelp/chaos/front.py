"""Whose turn it is to do without the front: the router, its server, or the registry that it starts from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from kelp.chaos.done import Victimless

_POLL_S = 0.3
_LONGEST_WAIT_S = 20.0
_SERVING_S = 5.0


class Front:
    """Faults of the front come one after the other; made on the event loop that they are done on.

    All clients wait where there is one router. One that is ended over and over before it can serve, for longer than a
    deadline, would show how long that is and nothing else; and one that starts without a registry knows no worker that
    has been started since.

    Args:
        is_whole: Whether whoever asks is served; blocks.
    """

    def __init__(self, is_whole: Callable[[], bool], serving_s: float = _SERVING_S) -> None:
        self._is_whole = is_whole
        self._serving_s = serving_s
        self._is_taken = False

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until whoever asks has been served again for a while; nobody else has the front until the block ends.

        Raises:
            Victimless: That does not come.
        """
        await self._wait()
        self._is_taken = True
        try:
            yield
        finally:
            self._is_taken = False

    async def _wait(self) -> None:
        now_s = time.monotonic()
        broken_s, deadline_s = now_s, now_s + _LONGEST_WAIT_S
        while now_s < broken_s + self._serving_s:
            await asyncio.sleep(_POLL_S)
            is_whole = await asyncio.to_thread(self._is_whole)
            now_s = time.monotonic()
            # Asked last, and here: between this and the turn itself nothing else runs.
            if self._is_taken or not is_whole:
                broken_s = now_s
            if now_s > deadline_s:
                raise Victimless("the router has not been back for long, or others had it")
