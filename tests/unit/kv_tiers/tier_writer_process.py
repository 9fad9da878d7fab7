"""Writes blocks into an arena and a disk tier until it is killed: `tier_writer_process.py FOLDER SEED KEY_FILE`.

Says on stdout what it is about to do (`will TIER SLOT NUMBER`) and what is done (`did ...`); number -1 is a clear.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from support.tier_rig import block, disk_config, fill, make_arena, open_disk

NUM_DISK_SLOTS, NUM_ARENA_SLOTS = 12, 8
SCRATCH = 7


def main() -> None:
    folder, seed, key_file = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dice = random.Random(seed)
    arena = make_arena(folder, NUM_ARENA_SLOTS)
    disk = open_disk(disk_config(folder, NUM_DISK_SLOTS, key_file=key_file or None), arena)
    number = seed * 1_000_000
    while True:
        number += 1
        is_clear = dice.random() < 0.2
        if dice.random() < 0.5:
            slot = dice.randrange(SCRATCH)
            say("will", "host", slot, -1 if is_clear else number)
            arena.clear([slot])
            if not is_clear:
                fill(arena, slot, number)
                arena.commit(slot, block(number))
            say("did", "host", slot, -1 if is_clear else number)
        else:
            slot = dice.randrange(NUM_DISK_SLOTS)
            say("will", "disk", slot, -1 if is_clear else number)
            if is_clear:
                disk.clear([slot], is_wiped=dice.random() < 0.5)
            else:
                fill(arena, SCRATCH, number)
                assert disk.write([(SCRATCH, slot, block(number))]) == [True]
            say("did", "disk", slot, -1 if is_clear else number)


def say(*words: object) -> None:
    print(*words, flush=True)


if __name__ == "__main__":
    main()
