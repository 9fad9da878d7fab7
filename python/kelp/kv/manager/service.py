"""The KV block manager as workers see it: batches of operations in, a result for each out.

Nothing here waits for lower tiers or for other workers' READs but the answer to whoever asked for them; what fails is
answered, typed, and never raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Sequence

from kelp.core.errors import CapacityError, InternalError, InvalidRequest, KelpError, NotFound, WorkerLost
from kelp.core.kv_manager_messages import (
    Await,
    Clear,
    Commit,
    Done,
    GetStats,
    Join,
    Joined,
    Match,
    Onboard,
    Operation,
    Pin,
    Refused,
    Release,
    Renew,
    Renewed,
    Result,
    SpaceRecord,
    Stats,
    Store,
    Unknown,
    decode_operations,
    encode_batch,
)
from kelp.core.metrics import KV_MANAGER_OPERATIONS, KV_MANAGER_REFUSED
from kelp.core.types import SequenceHash
from kelp.kv.manager.members import Member
from kelp.kv.manager.opening import open_tiers
from kelp.kv.manager.parts import ManagerParts
from kelp.kv.manager.space import Space
from kelp.kv.manager.stats import ManagerStats

_log = logging.getLogger(__name__)
_AWAIT_S = 0.5
_OfWorker = Store | Commit | Onboard | Await | Renew | Release


class KvBlockManager:
    """One per host; belongs to one event loop."""

    def __init__(self, parts: ManagerParts) -> None:
        self._parts = parts
        self._stats = ManagerStats(parts.metrics)
        self._space: Space | None = None
        self._opening = asyncio.Lock()
        self._num_open = 0
        self._is_stopped = False
        self._epoch = uuid.uuid4().hex

    @property
    def epoch(self) -> str:
        """Names this incarnation; another one serves another model, or another process."""
        return self._epoch

    @property
    def space(self) -> Space | None:
        """What is served now; None before the first worker has joined."""
        return self._space

    async def handle(self, raw: bytes) -> bytes:
        """Answer a batch.

        Raises:
            ProtocolError: It is no batch of operations.
        """
        return encode_batch(await self.answer(decode_operations(raw)))

    async def answer(self, operations: Sequence[Operation]) -> list[Result]:
        """A result for each operation, in order; they begin in order, and the slow ones run at the same time."""
        return list(await asyncio.gather(*(self._guarded(operation) for operation in operations)))

    async def stop(self, is_kept: bool = False) -> None:
        """Refuse from now on, and let go of everything.

        Args:
            is_kept: The host tier's content stays for the next process.
        """
        self._is_stopped = True
        async with self._opening:
            space, self._space = self._space, None
            if space is not None:
                await space.close(is_kept)

    async def _guarded(self, operation: Operation) -> Result:
        kind = type(operation).__name__.lower()
        self._stats.add(KV_MANAGER_OPERATIONS, kind=kind)
        self._num_open += 1
        try:
            if self._is_stopped:
                raise WorkerLost("the KV block manager is stopping")
            if self._num_open > self._parts.config.kv_manager.max_operations:
                raise CapacityError(f"kv_manager.max_operations: {self._num_open - 1} operations are under way")
            return await self._answer(operation)
        except KelpError as error:
            return self._refused(error)
        except Exception as error:
            _log.exception("operation %s failed", kind)
            return self._refused(InternalError(f"{kind}: {type(error).__name__}: {error}"))
        finally:
            self._num_open -= 1

    def _refused(self, error: KelpError) -> Refused:
        self._stats.add(KV_MANAGER_REFUSED, code=error.code)
        return Refused(str(error))

    async def _answer(self, operation: Operation) -> Result:
        if isinstance(operation, Join):
            return await self._join(operation)
        if isinstance(operation, GetStats):
            return self._get_stats()
        if isinstance(operation, _OfWorker):
            return await self._answer_worker(operation)
        if self._space is None:
            raise NotFound("no worker has joined the KV block manager yet: its tiers are not open")
        if isinstance(operation, Match):
            return await self._space.onboarding.match(operation)
        if isinstance(operation, Pin):
            names = [SequenceHash(name) for name in operation.hashes]
            return Done(self._space.pin(names, operation.ttl_s))
        assert isinstance(operation, Clear)
        return Done(await self._space.clearing.clear(operation.tenant, operation.tiers))

    async def _join(self, operation: Join) -> Joined:
        space = await self._space_for(operation.space)
        space.join(operation)
        return Joined(self._epoch, space.pool, space.host.leases.ttl_s, space.tiers)

    async def _space_for(self, record: SpaceRecord) -> Space:
        async with self._opening:
            if self._is_stopped:
                raise WorkerLost("the KV block manager is stopping")
            if self._space is not None and self._space.record != record:
                if self._space.is_used:
                    raise InvalidRequest(_difference(self._space.record, record))
                _log.info("the KV block manager changes over to model %s", record.model_id)
                space, self._space = self._space, None
                self._epoch = uuid.uuid4().hex
                await space.close(is_kept=False)
            if self._space is None:
                self._space = await self._open(record)
            return self._space

    async def _open(self, record: SpaceRecord) -> Space:
        opened = await asyncio.to_thread(open_tiers, record, self._parts)
        try:
            space = Space(record, self._epoch, opened, self._parts, self._stats)
        except BaseException:
            await asyncio.to_thread(opened.close)
            raise
        try:
            await space.start()
        except BaseException:
            await space.close(is_kept=True)
            raise
        return space

    async def _answer_worker(self, operation: _OfWorker) -> Result:
        space = self._space
        member = space.members.get(operation.worker_id, operation.epoch) if space is not None else None
        if space is None or member is None:
            return Unknown("worker")
        if isinstance(operation, Store):
            return await space.stores.store(member, operation)
        if isinstance(operation, Commit):
            return await self._commit(space, member, operation)
        if isinstance(operation, Onboard):
            return await space.onboarding.onboard(member.key, operation)
        if isinstance(operation, Await):
            return await self._await(space, member, operation)
        if isinstance(operation, Renew):
            return Renewed(tuple(space.host.leases.renew(member.key, operation.lease_ids)))
        return _release(space, member, operation)

    async def _commit(self, space: Space, member: Member, operation: Commit) -> Result:
        key, lost = (member.key, operation.store_id), frozenset(operation.lost)
        num_blocks = space.stores.commit(key, operation.is_valid, lost)
        if num_blocks is None:
            return Unknown("store")
        await space.host.written()
        return Done(num_blocks)

    async def _await(self, space: Space, member: Member, operation: Await) -> Result:
        bringing = space.onboarding.get(member.key, operation.lease_id)
        if bringing is None:
            return Unknown("lease")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(bringing.wait(operation.num_known), _AWAIT_S)
        return bringing.answer(operation.num_known) if bringing.lease.is_live else Unknown("lease")

    def _get_stats(self) -> Stats:
        if self._space is not None:
            self._space.report()
        return Stats(self._stats.values())


def _release(space: Space, member: Member, operation: Release) -> Done:
    for name in operation.corrupt:
        space.host.found_corrupt(SequenceHash(name))
    found = [space.host.leases.get(member.key, lease_id) for lease_id in dict.fromkeys(operation.lease_ids)]
    leases = [lease for lease in found if lease is not None]
    space.onboarding.note_read(leases, operation.num_read, operation.read_s)
    for lease in leases:
        space.host.leases.end(lease)
    return Done(len(leases))


def _difference(ours: SpaceRecord, theirs: SpaceRecord) -> str:
    for name in ours.__struct_fields__:
        if getattr(ours, name) != getattr(theirs, name):
            return f"join: space.{name} is {getattr(theirs, name)!r}, blocks here have {getattr(ours, name)!r}"
    return "join: the space differs"
