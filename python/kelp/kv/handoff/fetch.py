"""One handoff on the decode side: which remote block goes where, and when it has arrived for good.

Trusts nothing that the peer says about its blocks, and returns only when no READ of its own runs any more.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.errors import (
    DeadlineExceeded,
    FatalTransferError,
    KelpError,
    ProtocolError,
    from_message,
)
from kelp.core.handoff_messages import Announce, HandoffFailed, PrefillDone
from kelp.core.types import BlockId, num_blocks_for
from kelp.kv.handoff.peers import Connection, PeerDirectory
from kelp.kv.handoff.quarantine import QuarantinedTransferError
from kelp.kv.handoff.reads import Read, ReadLoop
from kelp.kv.handoff.stream import AttachStream
from kelp.transport.layout import check_block_ids

_READ_BYTES = 16 * 1024 * 1024
"""Posting may copy on the spot; smaller READs keep the thread fair and a cancelled fetch short."""
_STOP_MARGIN_S = 1.0
_DISCONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What a decode worker wants of a prefill worker.

    Attributes:
        block_ids: Local blocks of the whole prompt, in order; READs write into them.
        num_cached_blocks: The first of them that hold their KV already.
        num_prompt_tokens: Length of the prompt.
        deadline_s: `Clock.monotonic_s` time after which the fetch fails with DeadlineExceeded.
    """

    block_ids: tuple[BlockId, ...]
    num_cached_blocks: int
    num_prompt_tokens: int
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The prompt's KV is in place; decoding continues from `first_token`.

    `transfer_start_ns` and `transfer_done_ns` are wall-clock; 0 if nothing had to be moved.
    """

    first_token: int
    first_log_prob: float
    num_transferred_blocks: int
    transfer_start_ns: int
    transfer_done_ns: int


@dataclass(frozen=True, slots=True)
class FetchContext:
    """What all fetches of a reader share."""

    reads: ReadLoop
    peers: PeerDirectory
    clock: Clock
    block_size: int
    block_bytes: int
    transfer_timeout_s: float


class Fetch:
    """One fetch; `run` is called once."""

    def __init__(self, context: FetchContext, connection: Connection, plan: FetchPlan) -> None:
        self._context = context
        self._connection = connection
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[FetchResult] = self._loop.create_future()
        # Marks the outcome as seen: a cancelled fetch never looks at it.
        self._outcome.add_done_callback(lambda outcome: outcome.cancelled() or outcome.exception())
        self._reads: list[Read] = []
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._num_unsettled = 0
        self._num_failed = 0
        self._num_announced_tokens = 0
        self._num_announced_blocks = 0
        self._last_read_s = 0.0
        self._start_ns = 0
        self._done_ns = 0
        self._prefill_done: PrefillDone | None = None
        self._is_peer_suspect = False

    async def run(self, stream: AttachStream) -> FetchResult:
        """Follow the announcements until all KV is here.

        Raises:
            QuarantinedTransferError: Local blocks may still be written to; also in place of a cancellation.
            KelpError: It failed; nothing writes into local blocks any more.
        """
        self._stream = stream
        try:
            await asyncio.wait({self._outcome}, timeout=self._remaining_s())
            if not self._outcome.done():
                raise DeadlineExceeded("handoff: the deadline passed before the prompt's KV arrived")
            return self._outcome.result()
        except BaseException as error:
            self._outcome.cancel()
            await self._give_up(error)
            raise

    def on_event(self, event: Announce | PrefillDone | HandoffFailed) -> None:
        """Take an event of the peer.

        Raises:
            ProtocolError: The peer contradicts itself or the plan; names the field.
        """
        if self._outcome.done():
            return
        if isinstance(event, HandoffFailed):
            self.on_broken(from_message(event.message), False)
            return
        if self._prefill_done is not None:
            raise ProtocolError(f"handoff: {event.kind} after done")
        if isinstance(event, Announce):
            self._read_announced(event)
        else:
            self._end_announcements(event)
        self._complete_if_done()

    def on_broken(self, error: KelpError, is_peer_suspect: bool) -> None:
        """The handoff cannot succeed any more."""
        if not self._outcome.done():
            self._is_peer_suspect = is_peer_suspect
            self._outcome.set_exception(error)

    def _read_announced(self, event: Announce) -> None:
        plan, first = self._plan, self._num_announced_blocks
        if not self._num_announced_tokens <= event.num_tokens <= plan.num_prompt_tokens:
            raise ProtocolError(
                f"announce: num_tokens {event.num_tokens} is outside of "
                f"{self._num_announced_tokens} to {plan.num_prompt_tokens}"
            )
        num_blocks = first + len(event.block_ids)
        limit = num_blocks_for(event.num_tokens, self._context.block_size)
        if num_blocks > limit:
            raise ProtocolError(f"announce: {num_blocks} block_ids exceed the {limit} of num_tokens {event.num_tokens}")
        remote_ids = tuple(BlockId(block_id) for block_id in event.block_ids)
        check_block_ids(remote_ids, self._connection.peer.region.num_blocks, "announce: block_ids")
        self._num_announced_tokens, self._num_announced_blocks = event.num_tokens, num_blocks
        num_skipped = max(0, plan.num_cached_blocks - first)
        self._submit(remote_ids[num_skipped:], plan.block_ids[first + num_skipped : num_blocks])

    def _submit(self, remote_ids: tuple[BlockId, ...], local_ids: tuple[BlockId, ...]) -> None:
        step = max(1, _READ_BYTES // self._context.block_bytes)
        for begin in range(0, len(remote_ids), step):
            batch = slice(begin, begin + step)
            read = Read(self._connection.peer, remote_ids[batch], local_ids[batch])
            self._start_ns = self._start_ns or self._context.clock.wall_ns()
            self._reads.append(read)
            self._num_unsettled += 1
            self._is_idle.clear()
            read.finished.add_done_callback(self._hand_over)
            self._context.reads.submit(read)

    def _hand_over(self, finished: concurrent.futures.Future[float]) -> None:
        self._loop.call_soon_threadsafe(self._settle, finished)

    def _settle(self, finished: concurrent.futures.Future[float]) -> None:
        self._num_unsettled -= 1
        if self._num_unsettled == 0:
            self._is_idle.set()
        if finished.cancelled():
            return
        error = finished.exception()
        if error is not None:
            assert isinstance(error, KelpError), "the read loop raises typed errors only"
            self._num_failed += 1
            self.on_broken(error, True)
            return
        self._last_read_s = max(self._last_read_s, finished.result())
        self._done_ns = self._context.clock.wall_ns()
        self._complete_if_done()

    def _end_announcements(self, event: PrefillDone) -> None:
        needed = len(self._plan.block_ids)
        if self._num_announced_blocks != needed:
            raise ProtocolError(f"done: {self._num_announced_blocks} blocks were announced, the prompt has {needed}")
        self._prefill_done = event

    def _complete_if_done(self) -> None:
        done = self._prefill_done
        if done is None or self._num_unsettled or self._outcome.done():
            return
        if self._reads and not self._stream.validity.covers(self._last_read_s):
            self.on_broken(FatalTransferError("handoff: lease expired before the last READ was complete"), False)
            return
        num_transferred = len(self._plan.block_ids) - self._plan.num_cached_blocks
        self._outcome.set_result(
            FetchResult(done.first_token, done.first_log_prob, num_transferred, self._start_ns, self._done_ns)
        )

    def _remaining_s(self) -> float | None:
        if self._plan.deadline_s is None:
            return None
        return max(0.0, self._plan.deadline_s - self._context.clock.monotonic_s())

    async def _give_up(self, error: BaseException) -> None:
        stopping = asyncio.create_task(self._stop_reads())
        is_cancelled = False
        while not stopping.done():
            try:
                await asyncio.wait({stopping})
            except asyncio.CancelledError:
                is_cancelled = True
        disconnecting = stopping.result()
        if disconnecting is not None:
            raise QuarantinedTransferError(f"handoff: a READ cannot be stopped after {error}", disconnecting) from error
        if is_cancelled:
            raise asyncio.CancelledError from error

    async def _stop_reads(self) -> asyncio.Task[None] | None:
        """Wait until no READ writes; if that cannot be had, the disconnection that would ensure it."""
        for read in self._reads:
            read.finished.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), self._context.transfer_timeout_s + _STOP_MARGIN_S)
        is_clean = self._num_unsettled == 0 and self._num_failed == 0
        if is_clean and not self._is_peer_suspect:
            return None
        disconnecting = self._context.peers.drop(self._connection)
        if is_clean:
            return None
        await asyncio.wait({disconnecting}, timeout=_DISCONNECT_TIMEOUT_S)
        return None if disconnecting.done() else disconnecting
