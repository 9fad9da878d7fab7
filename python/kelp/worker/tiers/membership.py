"""Joining the KV block manager of this host, staying with it, and finding it again.

The worker never waits for the manager: while there is none, or it fails, `link` is None and nobody calls it; a task in
the background looks for it, ever more rarely. Knows nothing of what is kept there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kelp.client.base import KvManagerClient, WorkerAddress
from kelp.core.clock import Clock
from kelp.core.errors import DeadlineExceeded, KelpError, ProtocolError, WorkerLost, from_message
from kelp.core.kv_manager_messages import Join, Joined, Operation, Refused, Renew, Renewed, Result, Unknown
from kelp.core.metrics import KV_MANAGER_FAILURES, KV_MANAGER_JOINED, Metrics
from kelp.registry.base import KvManagerRecord
from kelp.worker.tiers.leases import LeaseBook
from kelp.worker.tiers.link import Link, Links

_log = logging.getLogger(__name__)
_JOIN_TIMEOUT_S = 30.0
"""The first worker that joins waits for the tiers to be opened."""
_RENEWALS_PER_TTL = 3
_MIN_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 30.0
_RENEWALS_TO_TRUST = 3
"""After so many, a failure counts as the first again."""
_FAILURES_KEPT = 16
_STATES = ("joined", "absent", "refused")


@dataclass(frozen=True, slots=True)
class MemberParts:
    """What a membership needs.

    Attributes:
        find: The manager to join, None without one; told the epochs of those that have failed, the last one last. May
            block on I/O.
        introduce: What to say to a manager; blocks for a moment.
        on_change: Called on the loop when a manager was joined or lost.
    """

    name: str
    find: Callable[[Sequence[str]], KvManagerRecord | None]
    introduce: Callable[[], Join]
    client: KvManagerClient
    links: Links
    clock: Clock
    metrics: Metrics
    on_change: Callable[[], None]
    call_timeout_s: float
    poll_s: float


class Membership:
    """See the module docstring; belongs to one event loop.

    Attributes:
        link: The manager that may be called now.
        leases: Are renewed while it is there.
    """

    def __init__(self, parts: MemberParts) -> None:
        self._parts = parts
        self.link: Link | None = None
        self.leases = LeaseBook()
        self._former: Link | None = None
        self._introduction: Join | None = None
        self._has_lost = asyncio.Event()
        self._backoff_s = _MIN_BACKOFF_S
        self._rest_s = 0.0
        self._failed: tuple[str, ...] = ()
        self._show("absent")

    async def call(self, link: Link, operation: Operation, timeout_s: float) -> Result:
        """Ask the manager one thing.

        Raises:
            WorkerLost: It does not answer, or does not know this worker any more; it will be joined again.
            KelpError: What it refused the operation with.
        """
        try:
            result = (await self._parts.client.call(link.address, [operation], timeout_s))[0]
            if isinstance(result, Unknown) and result.what == "worker":
                raise WorkerLost(f"the KV block manager {link.manager_id} has restarted or forgotten this worker")
        except KelpError as error:
            self.lose(link, error)
            raise
        if isinstance(result, Refused):
            refused = from_message(result.message)
            if isinstance(refused, WorkerLost):
                self.lose(link, refused)
            raise refused
        return result

    def lose(self, link: Link, error: KelpError) -> None:
        """Something is wrong with the manager: leave it alone until it has been joined again."""
        if self.link is not link:
            return
        _log.warning("the KV block manager %s is lost: %s", link.manager_id, error)
        self._note_failure(error, link.epoch)
        self.link, self._former = None, link
        self._has_lost.set()
        self._parts.on_change()

    def drop(self, link: Link) -> asyncio.Task[None]:
        """Disconnect from its memory, too; when the task is done, no READ from there writes any more."""
        self.lose(link, WorkerLost("a READ from it failed"))
        return self._parts.links.drop(link)

    async def run(self) -> None:
        """Find, join, renew, for ever."""
        num_renewed = 0
        while True:
            link = self.link
            if link is None:
                num_renewed = 0
                await self._rest()
                await self._seek()
                continue
            num_renewed += await self._renew(link)
            if num_renewed >= _RENEWALS_TO_TRUST:
                self._backoff_s, self._failed = _MIN_BACKOFF_S, ()
            self._has_lost.clear()
            if self.link is link:
                await self._wait_lost(link.ttl_s / _RENEWALS_PER_TTL)

    def stop(self) -> None:
        """Leave the manager; `run` has been cancelled."""
        for link in (self.link, self._former):
            if link is not None:
                self._parts.links.drop(link)
        self.link = self._former = None

    async def _wait_lost(self, timeout_s: float) -> None:
        # Not `wait_for`: up to Python 3.11 it swallows a cancellation that comes as its time runs out.
        waiting = asyncio.ensure_future(self._has_lost.wait())
        try:
            await asyncio.wait({waiting}, timeout=timeout_s)
        finally:
            waiting.cancel()

    async def _renew(self, link: Link) -> bool:
        asked = self.leases.of(link)
        introduction = await self._introduce()
        renew = Renew(introduction.worker_id, introduction.epoch, tuple(lease.lease_id for lease in asked))
        sent_s = self._parts.clock.monotonic_s()
        try:
            result = await self.call(link, renew, self._parts.call_timeout_s)
        except KelpError:
            # Without an answer nothing is known of the leases: they are over when their time has passed.
            return False
        if isinstance(result, Renewed):
            self.leases.renewed(asked, result.lease_ids, sent_s)
        return True

    async def _rest(self) -> None:
        """Leave a manager that failed alone for a while, unless another one shows itself."""
        rest_s, self._rest_s = self._rest_s, 0.0
        end_s = self._parts.clock.monotonic_s() + rest_s
        while (left_s := end_s - self._parts.clock.monotonic_s()) > 0:
            await asyncio.sleep(min(left_s, self._parts.poll_s))
            with contextlib.suppress(OSError):
                record = await asyncio.to_thread(self._parts.find, self._failed)
                if record is not None and record.epoch not in self._failed:
                    return

    async def _seek(self) -> None:
        """Try to join."""
        record: KvManagerRecord | None = None
        try:
            record = await asyncio.to_thread(self._parts.find, self._failed)
            if record is None:
                self._show("absent")
                self._rest_s, self._failed = self._parts.poll_s, ()
                return
            self.link = await self._join(record)
        except (KelpError, OSError) as error:
            _log.info("the KV block manager was not joined: %s", error)
            self._note_failure(error, "" if record is None else record.epoch)
            return
        self._show("joined")
        self._parts.on_change()

    def _note_failure(self, error: KelpError | OSError, epoch: str) -> None:
        reason = error.code if isinstance(error, KelpError) else "REGISTRY"
        self._parts.metrics.add(KV_MANAGER_FAILURES, worker=self._parts.name, reason=reason)
        is_absent = isinstance(error, WorkerLost | DeadlineExceeded | OSError)
        self._show("absent" if is_absent else "refused")
        if epoch:
            self._failed = (*(each for each in self._failed if each != epoch), epoch)[-_FAILURES_KEPT:]
        self._rest_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, _MAX_BACKOFF_S)

    async def _join(self, record: KvManagerRecord) -> Link:
        address = WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
        introduction = await self._introduce()
        result = (await self._parts.client.call(address, [introduction], _JOIN_TIMEOUT_S))[0]
        if isinstance(result, Refused):
            raise from_message(result.message)
        if not isinstance(result, Joined):
            raise ProtocolError(f"join: {type(result).__name__} was answered")
        former, self._former = self._former, None
        if former is not None:
            if former.epoch == result.manager_epoch and former.pool == result.pool and not former.is_dropped:
                return former
            self._parts.links.drop(former)
        return await self._parts.links.connect(record, result)

    async def _introduce(self) -> Join:
        if self._introduction is None:
            self._introduction = await asyncio.to_thread(self._parts.introduce)
        return self._introduction

    def _show(self, state: str) -> None:
        for known in _STATES:
            self._parts.metrics.set(KV_MANAGER_JOINED, known == state, worker=self._parts.name, state=known)
