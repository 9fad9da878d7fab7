"""Tier G4: which groups are where, by name alone; see `kv.tiers.base.ObjectTier`.

Groups are named by their last block (`names`), so whoever knows a prompt's hashes finds what any host has stored of it.
A group that was found damaged is not asked for again, and written anew when it is offered again. Store, process and
time limits are the gate's; listing and deleting are the upkeep's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from kelp.core.clock import Clock, SystemClock
from kelp.core.config_kv import ObjectTierConfig
from kelp.core.errors import RetryableTransferError
from kelp.core.types import SequenceHash
from kelp.kv.tiers.base import BlockRecord
from kelp.kv.tiers.objects.breaker import CircuitBreaker
from kelp.kv.tiers.objects.counters import ObjectCounters
from kelp.kv.tiers.objects.gate import StoreGate
from kelp.kv.tiers.objects.header import header_bytes
from kelp.kv.tiers.objects.known import KnownGroups
from kelp.kv.tiers.objects.messages import (
    ArenaMap,
    Ask,
    Asked,
    Block,
    Get,
    GetDone,
    GroupContent,
    GroupRead,
    GroupWrite,
    Hello,
    Put,
    PutDone,
    StoreAddress,
)
from kelp.kv.tiers.objects.names import KeySpace
from kelp.kv.tiers.objects.process import StoreProcess
from kelp.kv.tiers.objects.runs import GroupRun, group_ends, group_runs, spread
from kelp.kv.tiers.objects.sweep import Quota
from kelp.kv.tiers.objects.upkeep import Upkeep
from kelp.kv.tiers.sealing import Sealer

_MAX_LANES = 8
_MAX_LANE_BYTES = 64 * 1024 * 1024
"""Memory of the process for groups that move at once."""
_ASK_SHARE = 0.25
_MAX_ASKED = 16
_MAX_DAMAGED = 65536


class S3ObjectTier:
    """See `base.ObjectTier`. Making one does not wait for the store; until its process is ready it is unavailable.

    Args:
        space: `kv.tiers.records.space_digest`.
        arena: The host tier's memory, to be mapped by the process.
        key: Of encryption, `kv.tiers.sealing.KEY_BYTES` bytes; None for none.
        tenant_share: Of `config.max_bytes`, most that one tenant's objects may take.
    """

    def __init__(
        self,
        config: ObjectTierConfig,
        space: bytes,
        arena: ArenaMap,
        key: bytes | None = None,
        clock: Clock | None = None,
        tenant_share: float = 1.0,
    ) -> None:
        clock = clock or SystemClock()
        self.group_blocks = max(1, config.object_bytes // arena.block_bytes)
        self._block_bytes = arena.block_bytes
        lane_bytes = header_bytes(self.group_blocks) + self.group_blocks * arena.block_bytes
        self._num_lanes = max(1, min(_MAX_LANES, _MAX_LANE_BYTES // lane_bytes))
        self._keys = KeySpace(config.prefix, space, self.group_blocks, Sealer(key, space).key_id if key else b"")
        self._known = KnownGroups(clock)
        self._damaged: dict[SequenceHash, None] = {}
        address = StoreAddress(config.bucket, config.endpoint, config.region)
        self._process = StoreProcess(
            Hello(address, arena, space, self.group_blocks, self._num_lanes, config.timeout_s, key or b"")
        )
        breaker = CircuitBreaker(config.max_failures, config.retry_after_s, clock)
        self._gate = StoreGate(self._process, breaker, config.timeout_s)
        quota = Quota(config.max_bytes, tenant_share)
        self._upkeep = Upkeep(self._gate, self._keys, self._known, quota, clock)

    @property
    def is_available(self) -> bool:
        """See `base.ObjectTier`."""
        return self._gate.is_available

    @property
    def state(self) -> str:
        """See `base.ObjectTier`."""
        return self._gate.state if self._process.is_ready else "starting"

    @property
    def counters(self) -> ObjectCounters:
        """What happened so far."""
        self._gate.counters.num_starts = self._process.num_starts
        return self._gate.counters

    @property
    def events(self) -> Mapping[str, int]:
        """See `base.ObjectTier`."""
        return self.counters.events()

    @property
    def stored_bytes(self) -> int:
        """See `base.ObjectTier`."""
        return self.counters.listed_bytes

    @property
    def process_id(self) -> int | None:
        """Of the object-store process, while there is one."""
        return self._process.pid

    @property
    def full_tenants(self) -> frozenset[bytes]:
        """See `base.ObjectTier`."""
        return self._upkeep.full_tenants

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the process is at work; False if it is not by then."""
        return self._process.wait_ready(timeout_s)

    def quarantined(self) -> frozenset[int]:
        """See `base.ObjectTier`."""
        return self._process.quarantined()

    def put(self, arena_slots: Sequence[int], records: Sequence[BlockRecord]) -> bool:
        """See `base.ObjectTier`."""
        return self.put_groups([(arena_slots, records)])[0]

    def put_groups(self, groups: Sequence[tuple[Sequence[int], Sequence[BlockRecord]]]) -> list[bool]:
        """Write several groups, as many at once as there are lanes; each as in `put`."""
        outcome = [self._has(records[-1].sequence_hash) for _, records in groups]
        absent = [index for index, is_known in enumerate(outcome) if not is_known]
        for start in range(0, len(absent), self._num_lanes):
            batch = absent[start : start + self._num_lanes]
            for index, is_there in zip(batch, self._write([groups[index] for index in batch]), strict=True):
                outcome[index] = is_there
        return outcome

    def _write(self, groups: Sequence[tuple[Sequence[int], Sequence[BlockRecord]]]) -> list[bool]:
        request = Put(tuple(self._group_write(slots, records) for slots, records in groups))
        counters, started_s = self._gate.counters, time.monotonic()
        try:
            answer = self._gate.ask(request)
        except RetryableTransferError:
            self._upkeep.note_unsure(records[-1].tenant for _, records in groups)
            return [False] * len(groups)
        finally:
            counters.put_seconds += time.monotonic() - started_s
        assert isinstance(answer, PutDone)
        for (_, records), outcome in zip(groups, answer.outcomes, strict=True):
            counters.num_present += outcome == "present"
            counters.num_mismatches += outcome == "mismatch"
            if outcome == "stored":
                counters.num_puts += 1
                counters.put_bytes += len(records) * self._block_bytes
                self._damaged.pop(records[-1].sequence_hash, None)
            if outcome == "failed":
                self._upkeep.note_unsure([records[-1].tenant])
            if outcome in ("stored", "present"):
                names = [record.sequence_hash for record in records]
                self._known.add(records[-1].tenant, names[-1], names)
        return [outcome in ("stored", "present") for outcome in answer.outcomes]

    def _group_write(self, slots: Sequence[int], records: Sequence[BlockRecord]) -> GroupWrite:
        first, last = records[0], records[-1]
        assert len(records) == len(slots) == self.group_blocks and first.position % self.group_blocks == 0
        return GroupWrite(
            key=self._keys.key(last.tenant, last.sequence_hash),
            tenant=last.tenant,
            slots=tuple(slots),
            blocks=tuple(Block.of(record) for record in records),
            is_forced=last.sequence_hash in self._damaged,
        )

    def find(self, hashes: Sequence[SequenceHash], first_position: int, tenant: bytes) -> int:
        """See `base.ObjectTier`. The store is asked for a few groups, spread over all of them, if it has the first.

        Groups are written in order, so those between two that are there are taken to be there: `get` finds out.
        """
        num_found, has_asked = 0, False
        ends = group_ends(len(hashes), first_position, self.group_blocks)
        for index, end in enumerate(ends):
            last = hashes[end]
            if last not in self._known and not has_asked and self._may_ask(last):
                has_asked = True
                self._ask([hashes[further] for further in ends[index:]], tenant)
            if not self._has(last):
                break
            members = hashes[max(0, end + 1 - self.group_blocks) : end + 1]
            self._known.use(last, members if len(members) == self.group_blocks else ())
            num_found = end + 1
        return num_found

    def _has(self, last: SequenceHash) -> bool:
        return last in self._known and last not in self._damaged

    def _may_ask(self, last: SequenceHash) -> bool:
        return self._gate.is_available and last not in self._damaged and not self._known.is_absent(last)

    def _ask(self, ends: Sequence[SequenceHash], tenant: bytes) -> None:
        wanted = [last for last in ends if last not in self._damaged]
        asked = spread(len(wanted), _MAX_ASKED)
        self._gate.counters.num_asked += 1
        try:
            keys = tuple(self._keys.key(tenant, wanted[index]) for index in asked)
            answer = self._gate.ask(Ask(keys), share=_ASK_SHARE)
        except RetryableTransferError:
            return
        assert isinstance(answer, Asked)
        there = [index for index, _ in takewhile(lambda pair: pair[1], zip(asked, answer.found, strict=True))]
        for last in wanted[: there[-1] + 1 if there else 0]:
            self._known.add(tenant, last)
        if not there:
            self._known.note_absent(wanted[0])

    def get(
        self, moves: Sequence[tuple[SequenceHash, int]], first_position: int, tenant: bytes
    ) -> list[BlockRecord | None]:
        """See `base.ObjectTier`. Of a group whose last block is not among `moves`, only what `find` or `put` named."""
        found: list[BlockRecord | None] = [None] * len(moves)
        runs = list(group_runs(moves, first_position, self.group_blocks, self._known.end_of))
        for start in range(0, len(runs), self._num_lanes):
            batch = runs[start : start + self._num_lanes]
            contents = self._read(batch, tenant)
            if contents is None:
                break
            for run, content in zip(batch, contents, strict=True):
                for offset, block in enumerate(content.blocks):
                    found[run.start + offset] = block.record(tenant) if block is not None else None
        return found

    def _read(self, runs: Sequence[GroupRun], tenant: bytes) -> Sequence[GroupContent] | None:
        """Contents by run; None if the store did not answer."""
        groups = [
            GroupRead(self._keys.key(tenant, run.last), tenant, run.first, tuple(run.names), tuple(run.slots))
            for run in runs
        ]
        counters, started_s = self._gate.counters, time.monotonic()
        try:
            answer = self._gate.ask(Get(tuple(groups)), [slot for run in runs for slot in run.slots])
        except RetryableTransferError:
            return None
        finally:
            counters.get_seconds += time.monotonic() - started_s
        assert isinstance(answer, GetDone)
        for run, content in zip(runs, answer.groups, strict=True):
            self._note(run, content)
        return answer.groups

    def _note(self, run: GroupRun, content: GroupContent) -> None:
        counters = self._gate.counters
        num_right = sum(block is not None for block in content.blocks)
        counters.num_gets += content.outcome in ("read", "damaged")
        counters.num_blocks += num_right
        counters.get_bytes += num_right * self._block_bytes
        if content.outcome == "missing":
            counters.num_missing += 1
            self._known.note_absent(run.last)
        elif content.outcome == "damaged":
            counters.num_damaged += len(run.names) - num_right
            self._damaged[run.last] = None
            if len(self._damaged) > _MAX_DAMAGED:
                del self._damaged[next(iter(self._damaged))]

    def forget(self, tenant: bytes | None) -> int:
        """See `base.ObjectTier`. What could not be deleted now is deleted by later `refresh`es.

        Raises:
            RetryableTransferError: The store could not be reached.
        """
        return self._upkeep.forget(tenant)

    @property
    def owed(self) -> frozenset[bytes | None]:
        """See `base.ObjectTier`."""
        return self._upkeep.owed

    def refresh(self) -> Iterable[tuple[SequenceHash, ...]]:
        """See `base.ObjectTier`. A group that this host has neither written nor found is its last hash alone.

        Raises:
            RetryableTransferError: The store could not be reached.
        """
        self._upkeep.refresh()
        return list(self._known)

    def close(self) -> None:
        """See `base.ObjectTier`. Takes a second at most."""
        self._process.close()
