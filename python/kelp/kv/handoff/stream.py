"""The decode side of an `Attach` call: heartbeats out, events in, an acknowledgement at the end.

gRPC cancels a call whose pending read or write is cancelled, so the tasks that own the call live as long as it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from pydantic import BaseModel

from kelp.core.clock import Clock
from kelp.core.errors import FatalTransferError, InternalError, KelpError, ProtocolError, WorkerLost
from kelp.core.handoff_messages import (
    HANDOFF_EVENT,
    Acknowledge,
    Announce,
    Attach,
    HandoffFailed,
    Heartbeat,
    LeaseRenewed,
    PrefillDone,
)
from kelp.core.wire import decode_message, encode_message
from kelp.kv.handoff.lease import LeaseValidity
from kelp.kv.handoff.peers import Connection
from kelp.kv.handoff.wire import ATTACH, from_rpc_error, rpc_path

_log = logging.getLogger(__name__)

_HEARTBEATS_PER_TTL = 5
_FAREWELL_S = 2.0


@dataclass(frozen=True, slots=True)
class StreamEvents:
    """Where a stream reports to; called on the loop's thread.

    Attributes:
        on_event: Everything but lease renewals; may raise ProtocolError.
        on_broken: The stream is of no use any more; the flag says whether the peer itself is in doubt.
    """

    on_event: Callable[[Announce | PrefillDone | HandoffFailed], None]
    on_broken: Callable[[KelpError, bool], None]


class AttachStream:
    """One `Attach` call of `handoff_id`, from construction to `finish`."""

    def __init__(
        self, connection: Connection, handoff_id: str, clock: Clock, answer_timeout_s: float, events: StreamEvents
    ) -> None:
        self.validity = LeaseValidity(clock)
        self._endpoint = connection.endpoint
        self._handoff_id = handoff_id
        self._clock = clock
        self._answer_timeout_s = answer_timeout_s
        self._events = events
        self._ttl_s = 0.0
        self._is_answered = asyncio.Event()
        self._shall_acknowledge = asyncio.Event()
        self._proven = connection.proven
        self._call = connection.channel.stream_stream(rpc_path(ATTACH))()
        self._listener = asyncio.create_task(self._listen())
        self._tasks = (
            self._listener,
            asyncio.create_task(self._talk()),
            asyncio.create_task(self._watch()),
        )

    async def finish(self) -> None:
        """No READ of this handoff runs any more: let the lease end, then close; never raises."""
        if self._is_answered.is_set():
            self._shall_acknowledge.set()
            await asyncio.wait({self._listener}, timeout=_FAREWELL_S)
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self) -> None:
        try:
            while True:
                raw = await self._call.read()
                if not isinstance(raw, bytes):  # gRPC's end-of-stream marker
                    self._events.on_broken(WorkerLost(f"prefill worker {self._endpoint} ended the handoff"), False)
                    return
                try:
                    self._take(raw)
                except KelpError as error:
                    # The stream goes on: it still has to carry the acknowledgement that ends the lease.
                    self._events.on_broken(error, False)
        except grpc.RpcError as error:
            broken = from_rpc_error(error, self._endpoint)
            self._events.on_broken(broken, isinstance(broken, WorkerLost))
        except asyncio.CancelledError:
            self._events.on_broken(WorkerLost(f"the connection to {self._endpoint} was closed"), False)
            raise
        except Exception as error:
            _log.exception("a handoff event could not be handled")
            self._events.on_broken(InternalError(f"handoff: {type(error).__name__}: {error}"), False)

    def _take(self, raw: bytes) -> None:
        event = decode_message(HANDOFF_EVENT, raw, f"handoff event of {self._endpoint}")
        if not isinstance(event, LeaseRenewed):
            self._events.on_event(event)
            return
        if not self.validity.answered(event.heartbeat, event.ttl_s):
            raise ProtocolError(f"heartbeat: {event.heartbeat} was answered, but is not outstanding")
        self._ttl_s = event.ttl_s
        self._is_answered.set()

    async def _talk(self) -> None:
        try:
            self.validity.next_heartbeat()
            await self._call.write(self._proven(encode_message(Attach(handoff_id=self._handoff_id))))
            await self._is_answered.wait()
            while not await self._is_leaving(self._ttl_s / _HEARTBEATS_PER_TTL):
                await self._write(Heartbeat(number=self.validity.next_heartbeat()))
            await self._write(Acknowledge())
            await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The call has ended; the listener learns why.
            return

    async def _is_leaving(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._shall_acknowledge.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def _watch(self) -> None:
        try:
            await asyncio.wait_for(self._is_answered.wait(), self._answer_timeout_s)
        except asyncio.TimeoutError:
            silent = f"prefill worker {self._endpoint} is silent for {self._answer_timeout_s} s"
            self._events.on_broken(WorkerLost(silent), True)
            return
        while self.validity.covers(self._clock.monotonic_s()):
            await asyncio.sleep(self._ttl_s / _HEARTBEATS_PER_TTL)
        self._events.on_broken(
            FatalTransferError(f"handoff {self._handoff_id}: lease expired, no heartbeat was answered in time"), False
        )

    async def _write(self, command: BaseModel) -> None:
        await self._call.write(encode_message(command))
