"""The prefill side of one reader's stream: attach, then announcements out and heartbeats in.

A stream that breaks says nothing about the reader's READs, so only an acknowledgement, a failed prefill or the
lease's ttl gives blocks back, never the end of the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc
from pydantic import BaseModel

from kelp.core.errors import CapacityError, KelpError, ProtocolError
from kelp.core.handoff_messages import (
    HANDOFF_COMMAND,
    Acknowledge,
    Attach,
    HandoffCommand,
    HandoffFailed,
    Heartbeat,
    LeaseRenewed,
)
from kelp.core.wire import decode_message, encode_message
from kelp.kv.handoff.offer import Offer, OfferBoard, failed_event


class AttachSession:
    """One `Attach` call; `run` returns when the call shall end.

    Args:
        opened: The first message without the proof that it carries; raises PeerRefused.

    Attributes:
        is_stranger: The reader has not said yet who it is.
    """

    def __init__(
        self, context: Any, board: OfferBoard, attach_timeout_s: float, opened: Callable[[bytes], bytes]
    ) -> None:
        self._context = context
        self._board = board
        self._attach_timeout_s = attach_timeout_s
        self._opened = opened
        self._unanswered: int | None = None
        self._unwanted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_stranger = True

    def make_room(self) -> None:
        """Others wait: end it, unless the reader has said who it is."""
        if not self._unwanted.done():
            self._unwanted.set_result(None)

    async def run(self) -> None:
        """Serve the reader; whatever it does wrong, it is told as `HandoffFailed`."""
        # gRPC's own errors mean that the reader has gone; then only its lease says when the blocks are free.
        with contextlib.suppress(grpc.aio.BaseError):
            try:
                offer = await self._attach()
                await self._converse(offer)
            except KelpError as error:
                await self._write(failed_event(error))

    async def _attach(self) -> Offer:
        first = self._opened(await self._first())
        self.is_stranger = False
        command = decode_message(HANDOFF_COMMAND, first, "handoff command")
        if not isinstance(command, Attach):
            raise ProtocolError("attach: the first message must be of kind attach")
        offer = await self._board.find(command.handoff_id, self._attach_timeout_s)
        offer.claim()
        self._unanswered = 0
        return offer

    async def _first(self) -> bytes:
        reading = asyncio.ensure_future(self._read_raw())
        try:
            either: set[asyncio.Future[Any]] = {reading, self._unwanted}
            await asyncio.wait(either, timeout=self._attach_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
        finally:
            await _cancel(reading)
        if self._unwanted.done():
            raise CapacityError("attach: others wait, and nothing has arrived")
        raise ProtocolError(f"attach: nothing arrived within {self._attach_timeout_s} s")

    async def _converse(self, offer: Offer) -> None:
        talk = asyncio.create_task(self._talk(offer))
        listen = asyncio.create_task(self._listen(offer))
        try:
            done, _ = await asyncio.wait({talk, listen}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(talk, listen)
        for task in done:
            task.result()

    async def _listen(self, offer: Offer) -> None:
        expected = 1
        while True:
            command = await self._read()
            if isinstance(command, Acknowledge):
                offer.end(ProtocolError(f"handoff {offer.handoff_id}: acknowledged already"))
                return
            if not isinstance(command, Heartbeat) or command.number < expected:
                raise ProtocolError(f"handoff {offer.handoff_id}: {command!r} is out of order")
            expected = command.number + 1
            if offer.renew():
                # One slot, not a queue: a reader that does not listen cannot make answers pile up.
                self._unanswered = command.number
                offer.has_news.set()

    async def _talk(self, offer: Offer) -> None:
        num_told = 0
        while True:
            if self._unanswered is not None and offer.is_live:
                number, self._unanswered = self._unanswered, None
                await self._write(LeaseRenewed(heartbeat=number, ttl_s=offer.lease.ttl_s))
            elif num_told < len(offer.events):
                event = offer.events[num_told]
                num_told += 1
                await self._write(event)
                if isinstance(event, HandoffFailed):
                    return
            else:
                offer.has_news.clear()
                await offer.has_news.wait()

    async def _read(self) -> HandoffCommand:
        return decode_message(HANDOFF_COMMAND, await self._read_raw(), "handoff command")

    async def _read_raw(self) -> bytes:
        raw = await self._context.read()
        if not isinstance(raw, bytes):  # gRPC's end-of-stream marker
            raise ProtocolError("the stream ended without an acknowledgement")
        return raw

    async def _write(self, event: BaseModel) -> None:
        await self._context.write(encode_message(event))


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
