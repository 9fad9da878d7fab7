"""A process that reads from a `pool_owner.py` of its own, prints OK and must then exit with 0, as must the owner."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from kelp.core.types import BlockId
from kelp.transport.base import Region, TransferState
from kelp.transport.nixl import NixlAgent

NUM_BLOCKS, BLOCK_BYTES = 8, 4096


def main() -> None:
    arguments = [sys.executable, str(Path(__file__).with_name("pool_owner.py")), str(NUM_BLOCKS), str(BLOCK_BYTES)]
    owner = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pool = np.zeros((NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    agent = NixlAgent("reader")
    agent.register(Region(pool.ctypes.data, NUM_BLOCKS, BLOCK_BYTES, "cpu"), pool)
    hello = json.loads(next(line for line in owner.stdout if line.startswith("READY ")).removeprefix("READY "))
    region = Region(hello["base_address"], NUM_BLOCKS, BLOCK_BYTES, "cpu")
    peer = agent.connect(bytes.fromhex(hello["metadata"]), region)
    transfer = agent.start_read(peer, [BlockId(5)], [BlockId(2)])
    while transfer.poll() is TransferState.RUNNING:
        time.sleep(0.0005)
    owner.communicate("")
    if (pool[2] == 5).all() and owner.returncode == 0:
        print("OK")


if __name__ == "__main__":
    main()
