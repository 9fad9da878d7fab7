"""A process that owns a registered pool: `pool_owner.py NUM_BLOCKS BLOCK_BYTES`; ends when stdin closes."""

from __future__ import annotations

import json
import sys

import numpy as np

from kelp.transport.base import Region
from kelp.transport.nixl import NixlAgent


def main() -> None:
    num_blocks, block_bytes = int(sys.argv[1]), int(sys.argv[2])
    pool = np.empty((num_blocks, block_bytes), dtype=np.uint8)
    pool[:] = (np.arange(num_blocks) % 251)[:, None]
    agent = NixlAgent("owner")
    agent.register(Region(pool.ctypes.data, num_blocks, block_bytes, "cpu"), pool)
    hello = {"metadata": agent.metadata().hex(), "base_address": pool.ctypes.data}
    print("READY " + json.dumps(hello), flush=True)
    sys.stdin.read()
    agent.close()


if __name__ == "__main__":
    main()
