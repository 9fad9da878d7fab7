"""Whatever happens to its files, the disk tier never gives a wrong byte and never raises."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kelp.kv.tiers.disk import FileDiskTier
from support.examples import examples
from support.tier_rig import block, content, disk_config, fill, flip, make_arena, open_disk

NUM_SLOTS, NUM_BLOCKS = 6, 10
SLOTS = st.integers(0, NUM_SLOTS - 1)


class DiskTierMachine(RuleBasedStateMachine):
    """Writes, reads, clears and restarts; damage comes only while nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kelp-tier-"))
        self.arena = make_arena(self.folder)
        self.written: dict[int, int] = {}
        self.is_damaged = False
        self.disk: FileDiskTier | None = None

    @initialize(is_sealed=st.booleans())
    def start(self, is_sealed: bool) -> None:
        (self.folder / "key").write_bytes(b"k" * 32)
        # Through the page cache: with O_DIRECT every restart would make a NIXL agent, which takes time.
        key = {"key_file": self.folder / "key"} if is_sealed else {}
        self.config = disk_config(self.folder, NUM_SLOTS, direct_io="never", **key)
        self.disk = open_disk(self.config, self.arena)

    @rule(moves=st.dictionaries(SLOTS, st.integers(0, NUM_BLOCKS - 1), min_size=1))
    def write(self, moves: dict[int, int]) -> None:
        for arena_slot, number in enumerate(moves.values()):
            fill(self.arena, arena_slot, number)
        entries = [(place, slot, block(number)) for place, (slot, number) in enumerate(moves.items())]
        results = self.disk.write(entries)
        assert all(results)
        self.written.update(moves)

    @rule(slots=st.lists(SLOTS, unique=True), is_wiped=st.booleans())
    def clear(self, slots: list[int], is_wiped: bool) -> None:
        self.disk.clear(slots, is_wiped)
        for slot in slots:
            self.written.pop(slot, None)

    @rule(moves=st.dictionaries(SLOTS, st.integers(0, NUM_BLOCKS - 1), min_size=1))
    def read(self, moves: dict[int, int]) -> None:
        entries = [(slot, place, block(number)) for place, (slot, number) in enumerate(moves.items())]
        for (slot, place, record), is_right in zip(entries, self.disk.read(entries), strict=True):
            if is_right:
                assert bytes(self.arena.view(place)) == content(record.position)
                assert self.written[slot] == record.position
            else:
                assert self.is_damaged or self.written.get(slot) != record.position

    @rule()
    def restart(self) -> None:
        self.disk.close()
        self.reopen()

    @precondition(lambda self: self.disk is not None)
    @rule(file=st.sampled_from(["blocks", "records", "manifest.json"]), share=st.floats(0, 1), data=st.data())
    def damage(self, file: str, share: float, data: st.DataObject) -> None:
        folder = self.disk._folder.path
        self.disk.close()
        size = (folder / file).stat().st_size
        if data.draw(st.booleans(), label="cut"):
            os.truncate(folder / file, int(share * size))
        elif size:
            flip(folder / file, min(size - 1, int(share * size)))
        self.is_damaged = True
        self.reopen()

    def reopen(self) -> None:
        self.disk = open_disk(self.config, self.arena)
        found = {slot: record.position for slot, record in self.disk.recovered()}
        if self.is_damaged:
            assert found.items() <= self.written.items()
        else:
            assert found == self.written

    def teardown(self) -> None:
        if self.disk is not None:
            self.disk.close()
        self.arena.close(is_kept=False)
        shutil.rmtree(self.folder)


TestDiskTier = DiskTierMachine.TestCase
TestDiskTier.settings = settings(
    max_examples=examples(20), stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
