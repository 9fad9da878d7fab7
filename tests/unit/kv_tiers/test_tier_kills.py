"""A process that writes blocks is killed at random points: what it had finished is there, and nothing is wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tier_writer_process import NUM_ARENA_SLOTS, NUM_DISK_SLOTS

from support.tier_rig import block, content, disk_config, make_arena, open_disk

HERE = Path(__file__).parent
Place = tuple[str, int]


class Ledger:
    """What must be where: a number, -1 for nothing; in doubt is what the writer was at when it died."""

    def __init__(self) -> None:
        self.certain: dict[Place, int] = {}
        self.in_doubt: dict[Place, set[int]] = {}

    def hear(self, line: str) -> None:
        word, tier, slot, number = line.split()
        place = (tier, int(slot))
        if word == "will":
            self.in_doubt[place] = {-1, self.certain.get(place, -1), int(number)}
        else:
            del self.in_doubt[place]
            self.certain[place] = int(number)

    def settle(self, tier: str, found: dict[int, int], num_slots: int) -> None:
        """Compare with what was found, and know it from now on."""
        for slot in range(num_slots):
            place, number = (tier, slot), found.get(slot, -1)
            allowed = self.in_doubt.pop(place, {self.certain.get(place, -1)})
            assert number in allowed, f"{place}: found {number}, expected one of {allowed}"
            self.certain[place] = number


def run_and_kill(folder: Path, seed: int, key_file: str, num_lines: int) -> list[str]:
    arguments = [sys.executable, str(HERE / "tier_writer_process.py"), str(folder), str(seed), key_file]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_lines)]
        process.kill()
        rest = process.stdout.read()
    assert all(lines), "the writer died by itself"
    return [line for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_killed_writer_leaves_all_it_had_finished_and_nothing_wrong(tmp_path: Path, is_sealed: bool) -> None:
    key_file = ""
    if is_sealed:
        key_file = str(tmp_path / "key")
        Path(key_file).write_bytes(b"k" * 32)
    ledger, dice = Ledger(), random.Random(7)
    for seed in range(1, 5):
        for line in run_and_kill(tmp_path, seed, key_file, dice.randrange(1, 120)):
            ledger.hear(line)
        arena = make_arena(tmp_path, NUM_ARENA_SLOTS)
        whole = {
            slot: record.position
            for slot, record in arena.recovered()
            if arena.checksum(slot, record.sequence_hash) == record.checksum
        }
        assert all(bytes(arena.view(slot)) == content(number) for slot, number in whole.items())
        ledger.settle("host", whole, NUM_ARENA_SLOTS - 1)
        disk = open_disk(disk_config(tmp_path, NUM_DISK_SLOTS, key_file=key_file or None), arena)
        right: dict[int, int] = {}
        for slot, record in disk.recovered():
            assert record == block(record.position)
            if disk.read([(slot, NUM_ARENA_SLOTS - 1, record)]) == [True]:
                assert bytes(arena.view(NUM_ARENA_SLOTS - 1)) == content(record.position)
                right[slot] = record.position
        ledger.settle("disk", right, NUM_DISK_SLOTS)
        disk.close()
        arena.close(is_kept=True)
    assert any(number > 0 for number in ledger.certain.values())
