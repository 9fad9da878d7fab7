"""The one thread that posts READs and polls them.

Posting may block for a whole copy, and polling from several threads starves the transport's own progress
threads; one thread with a back-off does neither to the event loop. Knows nothing of handoffs.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from kelp.core.clock import Clock
from kelp.core.errors import FatalTransferError, InternalError, KelpError
from kelp.core.types import BlockId
from kelp.kv.background import yield_to_others
from kelp.transport.base import Agent, Peer, Transfer, TransferState

_log = logging.getLogger(__name__)

_MIN_BACKOFF_S = 50e-6
_MAX_BACKOFF_S = 1e-3


@dataclass(frozen=True, slots=True)
class Read:
    """Blocks to READ, pairwise; `finished` yields the monotonic time at which they were seen to be complete.

    Cancelling `finished` works until the READ is posted. A READ that raised may still write into local memory
    until its peer is disconnected.
    """

    peer: Peer
    remote_ids: Sequence[BlockId]
    local_ids: Sequence[BlockId]
    finished: concurrent.futures.Future[float] = field(default_factory=concurrent.futures.Future)


@dataclass(frozen=True, slots=True)
class _Posted:
    read: Read
    transfer: Transfer
    deadline_s: float


class ReadLoop:
    """Posts READs in the order they were submitted and polls all that run.

    Args:
        timeout_s: A READ that takes longer is given up with FatalTransferError.
        can_wait: Nobody waits for these READs; see `kv.background`.
    """

    def __init__(self, agent: Agent, clock: Clock, timeout_s: float, can_wait: bool = False) -> None:
        self._agent = agent
        self._clock = clock
        self._timeout_s = timeout_s
        self._can_wait = can_wait
        self._submitted: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._posted: list[_Posted] = []
        self._thread = threading.Thread(target=self._run, name="kelp-kv-reads", daemon=True)
        self._thread.start()

    def submit(self, read: Read) -> None:
        """Queue a READ; thread-safe."""
        self._submitted.put(read)

    def close(self) -> None:
        """End the thread; READs still running are forgotten, so the agent must be closed next."""
        self._submitted.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._can_wait:
            yield_to_others()
        backoff_s = _MIN_BACKOFF_S
        while True:
            try:
                read = self._submitted.get(timeout=backoff_s if self._posted else None)
            except queue.Empty:
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            else:
                if read is None:
                    break
                self._post(read)
                backoff_s = _MIN_BACKOFF_S
            num_posted = len(self._posted)
            self._posted = [posted for posted in self._posted if not self._settle(posted)]
            if len(self._posted) < num_posted:
                backoff_s = _MIN_BACKOFF_S
        for posted in self._posted:
            posted.read.finished.set_exception(FatalTransferError("read: this worker is closing"))

    def _post(self, read: Read) -> None:
        if not read.finished.set_running_or_notify_cancel():
            return
        deadline_s = self._clock.monotonic_s() + self._timeout_s
        try:
            transfer = self._agent.start_read(read.peer, read.remote_ids, read.local_ids)
        except Exception as error:
            read.finished.set_exception(_typed(error))
            return
        self._posted.append(_Posted(read, transfer, deadline_s))

    def _settle(self, posted: _Posted) -> bool:
        try:
            state = posted.transfer.poll()
            now_s = self._clock.monotonic_s()
            if state is TransferState.RUNNING and now_s < posted.deadline_s:
                return False
            posted.transfer.release()
        except Exception as error:
            posted.transfer.release()
            posted.read.finished.set_exception(_typed(error))
            return True
        if state is TransferState.DONE:
            posted.read.finished.set_result(now_s)
        else:
            posted.read.finished.set_exception(
                FatalTransferError(f"read: not complete within transfer_timeout_s {self._timeout_s}")
            )
        return True


def _typed(error: Exception) -> KelpError:
    """The thread must outlive whatever a transport raises; only what it promised passes unchanged."""
    if isinstance(error, KelpError):
        return error
    _log.error("a transport raised what it may not", exc_info=error)
    return InternalError(f"transport: {type(error).__name__}: {error}")
