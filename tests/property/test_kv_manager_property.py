"""The block manager under any history: nobody is ever given wrong bytes, and nothing is lost, leaked or taken twice."""

from __future__ import annotations

import asyncio
import copy
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "kv_manager"))

from fake_tiers import StoreMemory
from manager_rig import Host, Worker, content_of, prompt_hashes, settled, space_of

from kelp.core.clock import FakeClock
from kelp.core.errors import ProtocolError
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import (
    Clear,
    Done,
    GetStats,
    Leased,
    Pin,
    Refused,
    Renew,
    Renewed,
    Stats,
    Stored,
    Unknown,
    decode_operations,
    encode_batch,
)
from kelp.core.types import SequenceHash
from kelp.kv.eviction.catalogue import POLICY_NAMES
from kelp.kv.manager import catching_up, lower
from kelp.kv.manager.service import KvBlockManager
from kelp.kv.tiers.clears import ClearJournal
from support.examples import examples
from support.waiting import until

NUM_SLOTS, NUM_DISK_SLOTS, TTL_S = 7, 9, 10.0
SALTS = ("", "a")
PROMPTS = [(salt, prompt_hashes(5, salt, first_token=100 * index)) for salt in SALTS for index in range(2)]
prompts = st.sampled_from(PROMPTS)
lengths = st.integers(1, 5)
workers = st.sampled_from(["w0", "w1"])
places = st.integers(0, 63)
"""Which of those there are, from the first again where there are fewer: how many may depend on the threads' timing,
and what is drawn must not."""


class ManagerMachine(RuleBasedStateMachine):
    """Plays two workers, time, crashes and damage."""

    @initialize(
        has_disk=st.booleans(),
        has_store=st.booleans(),
        share=st.sampled_from(["1.0", "0.6"]),
        eviction=st.sampled_from(POLICY_NAMES),
    )
    def begin(self, has_disk: bool, has_store: bool, share: str, eviction: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        for module, name in ((catching_up, "POLL_S"), (catching_up, "PAUSE_S"), (lower, "_POLL_S")):
            self.patch.setattr(module, name, 0.001)
        self.clock = FakeClock()
        self.host = Host(
            NUM_SLOTS,
            NUM_DISK_SLOTS if has_disk else 0,
            StoreMemory(2) if has_store else None,
            {
                "kv_manager.tenant_share": share,
                "kv_manager.lease_ttl_s": str(TTL_S),
                "kv_manager.eviction": eviction,
                "object_tier.refresh_s": "0.001",
            },
            self.clock,
            journal=self.folder / "clears",
        )
        # Cleared while the store was away, and not stored again since.
        self.owed: set[SequenceHash] = set()
        self.start()

    def start(self) -> None:
        self.manager = self.run(self._make())
        self.workers: dict[str, Worker] = {}
        # Of each live lease: what was leased, and until when.
        self.leases: dict[tuple[str, int], tuple[Leased, list[SequenceHash], float]] = {}
        self.pending: list[tuple[Worker, int]] = []
        for name in ("w0", "w1"):
            self.join(name)

    async def _make(self) -> KvBlockManager:
        return KvBlockManager(self.host.parts())

    def run(self, work):
        return self.loop.run_until_complete(work)

    @rule(name=workers)
    def join(self, name: str) -> None:
        """A worker comes, or comes back as another incarnation."""
        epoch = f"e{len(self.leases)}-{self.clock.monotonic_s()}-{id(object())}"
        self.leases = {key: lease for key, lease in self.leases.items() if key[0] != name}
        self.pending = [entry for entry in self.pending if entry[0].worker_id != name]
        self.workers[name] = Worker(self.manager, name, epoch, num_blocks=16)
        self.run(self.workers[name].join())

    @rule(name=workers, prompt=prompts, length=lengths, fate=st.sampled_from(["commit", "commit", "invalid", "later"]))
    def store(self, name: str, prompt: tuple[str, list[SequenceHash]], length: int, fate: str) -> None:
        worker, (salt, hashes) = self.workers[name], prompt
        self.owed.difference_update(hashes)
        operation = worker.store_operation(hashes[:length], tenant_digest(salt))
        if fate == "invalid":
            worker.pool[:] = 255
        result = self.run(worker.ask(operation))
        if isinstance(result, Unknown):
            self.join(name)
            return
        assert isinstance(result, Stored)
        if fate == "later":
            self.pending.append((worker, operation.store_id))
        else:
            self.run(worker.commit(operation.store_id, fate == "commit"))

    @rule(is_valid=st.booleans())
    def commit_late(self, is_valid: bool) -> None:
        if self.pending:
            worker, store_id = self.pending.pop(0)
            assert isinstance(self.run(worker.commit(store_id, is_valid)), Done | Unknown)

    @rule(name=workers, prompt=prompts, length=lengths)
    def onboard(self, name: str, prompt: tuple[str, list[SequenceHash]], length: int) -> None:
        worker, (salt, hashes) = self.workers[name], prompt
        if isinstance(self.run(worker.ask(Renew(name, worker.epoch, ()))), Unknown):
            self.join(name)
            worker = self.workers[name]
        lease_id, leased = self.run(worker.onboard(hashes[:length], tenant_digest(salt)))
        assert len(leased.ready) == leased.num_blocks
        if leased.num_blocks:
            self.leases[name, lease_id] = (leased, hashes, self.clock.monotonic_s() + TTL_S)

    @rule(place=places)
    def release(self, place: int) -> None:
        if self.leases:
            name, lease_id = sorted(self.leases)[place % len(self.leases)]
            del self.leases[name, lease_id]
            self.run(self.workers[name].release(lease_id))

    @rule(name=workers)
    def renew(self, name: str) -> None:
        worker = self.workers[name]
        ids = tuple(lease_id for owner, lease_id in self.leases if owner == name)
        result = self.run(worker.ask(Renew(name, worker.epoch, ids)))
        if isinstance(result, Renewed):
            for lease_id in result.lease_ids:
                leased, hashes, _ = self.leases[name, lease_id]
                self.leases[name, lease_id] = (leased, hashes, self.clock.monotonic_s() + TTL_S)

    @rule(seconds=st.sampled_from([1.0, 6.0, 40.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.leases = {key: lease for key, lease in self.leases.items() if lease[2] > self.clock.monotonic_s()}
        self.run(self._sweep())

    async def _sweep(self) -> None:
        space_of(self.manager).sweep()

    @rule(prompt=prompts, ttl_s=st.sampled_from([0.0, 5.0, 1000.0]))
    def pin(self, prompt: tuple[str, list[SequenceHash]], ttl_s: float) -> None:
        self.run(self.manager.answer([Pin(tuple(prompt[1]), ttl_s)]))

    @rule(salt=st.sampled_from([*SALTS, None]))
    def clear(self, salt: str | None) -> None:
        tenant = None if salt is None else tenant_digest(salt)
        (result,) = self.run(self.manager.answer([Clear(tenant)]))
        is_away = self.host.store is not None and not self.host.store.is_available
        assert isinstance(result, Refused if is_away else Done)
        # Their readers still read the tenant's own blocks, which nobody else finds any more.
        leased = {name for _, hashes, _ in self.leases.values() for name in hashes}
        for owner, hashes in PROMPTS:
            if salt in (None, owner):
                self._check_gone(hashes, leased)
                self.owed.update(hashes if is_away else ())
                self._check_not_in_store(() if is_away else hashes)

    @rule()
    def lose_the_store(self) -> None:
        if self.host.store is not None:
            self.host.store.is_available = False

    @rule()
    def find_the_store(self) -> None:
        """What has been cleared meanwhile goes from it, too; what it has missed follows."""
        if self.host.store is not None and not self.host.store.is_available:
            self.host.store.is_available = True
            self.run(until(lambda: len(space_of(self.manager).clearing) == 0, "all clears are finished"))
            self._check_not_in_store(self.owed)
            self.owed.clear()

    def _check_not_in_store(self, hashes: Iterable[SequenceHash]) -> None:
        if self.host.store is not None:
            assert not {key[1] for key in self.host.store.blocks}.intersection(hashes)
            assert all(content == content_of(key[1]) for key, (content, _) in self.host.store.blocks.items())

    def _check_gone(self, hashes: list[SequenceHash], leased: set[SequenceHash]) -> None:
        space = space_of(self.manager)
        for name in hashes:
            assert name not in space.host.shelf
            assert space.disk is None or name not in space.disk.shelf
            if name not in leased:
                rows = {row.tobytes() for row in self.host.memory.pool}
                assert content_of(name) not in rows, "the bytes are gone, too"

    @rule(place=places)
    def damage_disk(self, place: int) -> None:
        if self.host.disk is not None and self.host.disk_memory is not None and self.host.disk_memory.slots:
            slots = sorted(self.host.disk_memory.slots.items())
            _, (_, record) = slots[place % len(slots)]
            self.host.disk.damage(record.sequence_hash)

    @rule(damaged=st.sets(st.integers(0, NUM_SLOTS - 1), max_size=2))
    def crash(self, damaged: set[int]) -> None:
        """The process dies; what it left is found again, but for what was torn."""
        self.run(space_of(self.manager).host.thread.run(lambda: None))
        memory, disk_memory = copy.deepcopy(self.host.memory), copy.deepcopy(self.host.disk_memory)
        assert self.host.journal is not None
        cleared = {one.tenant for one in ClearJournal(self.host.journal).load()}
        committed = {
            record.sequence_hash
            for slot, record in memory.records.items()
            if slot not in damaged and not cleared & {record.tenant, None}
        }
        self.run(self.manager.stop(is_kept=True))
        for slot in damaged:
            memory.pool[slot] = np.frombuffer(b"torn" * 16, dtype=np.uint8)
        self.host.memory, self.host.disk_memory = memory, disk_memory
        self.start()
        space = space_of(self.manager)
        self.run(space.host.verify(list(space.host.shelf.names())))
        stats = self.run(self.manager.answer([GetStats()]))[0]
        assert isinstance(stats, Stats)
        num_evicted = stats.values.get('kelp_kv_tier_removed_total{reason="evicted",tier="host"}', 0)
        assert len(committed.difference(space.host.shelf.names())) <= num_evicted, "for what is still to be written"

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.run(settled(self.manager))
        space = space_of(self.manager)
        space.host.shelf.check_integrity()
        if space.disk is not None:
            space.disk.shelf.check_integrity()
            assert space.disk.shelf.slots.num_references == 0
        for name in space.host.shelf.names():
            if not space.host.is_unverified(name):
                slot = space.host.shelf.slot(name)
                assert self.host.memory.pool[slot].tobytes() == content_of(name)
        for leased, hashes, _ in self.leases.values():
            for ref, name in zip(leased.ready, hashes, strict=False):
                assert self.host.memory.pool[ref.slot].tobytes() == content_of(name)
        assert space.host.shelf.slots.num_references == sum(lease[0].num_blocks for lease in self.leases.values())

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.run(self.manager.stop())
            self.run(self.loop.shutdown_default_executor())
            self.loop.close()
            self.patch.undo()
            shutil.rmtree(self.folder)


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=examples(40), stateful_step_count=25, deadline=None)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_operations_or_a_typed_refusal(raw: bytes) -> None:
    try:
        operations = decode_operations(raw)
    except ProtocolError:
        return
    assert decode_operations(encode_batch(operations)) == operations


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_batch_is_operations_or_a_typed_refusal(data: st.DataObject) -> None:
    raw = bytearray(encode_batch([Pin((b"x" * 16,), 1.0), Clear(None), Renew("w", "e", (1, 2))]))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_operations(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except ProtocolError as error:
        assert "operations" in str(error)


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x80", b"\x91\x80"])
def test_what_is_no_batch_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="operations"):
        decode_operations(raw)
