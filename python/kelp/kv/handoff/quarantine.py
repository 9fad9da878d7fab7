"""The error for the rare case that local memory may still be written to when a fetch has to give up."""

from __future__ import annotations

import asyncio

from kelp.core.errors import FatalTransferError


class QuarantinedTransferError(FatalTransferError):
    """A READ could not be stopped: its local blocks must not be reused before `quarantine_released` returns."""

    code = "TRANSFER_QUARANTINED"

    def __init__(self, message: str, disconnecting: asyncio.Task[None] | None = None) -> None:
        super().__init__(message)
        self._disconnecting = disconnecting

    async def quarantine_released(self) -> None:
        """Wait until the peer is disconnected, after which nothing writes into the blocks; may take for ever."""
        if self._disconnecting is not None:
            await asyncio.wait({self._disconnecting})
