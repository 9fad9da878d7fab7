"""A worker's pool of a few large blocks over NIXL, for whoever READs from it; nothing else of a worker.

Arguments: name, blocks, bytes per block. Prints `POOL <agent's metadata in hex> <address>` once it can be READ.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from kelp.transport import open_agent
from kelp.transport.base import Region

if __name__ == "__main__":
    os.environ.setdefault("UCX_MODULES", "^efa")
    name, num_blocks, block_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    pool = np.full((num_blocks, block_bytes), 0xA5, np.uint8)
    agent = open_agent("nixl", name)
    agent.register(Region(pool.ctypes.data, num_blocks, block_bytes, "cpu"), pool)
    print(f"POOL {agent.metadata().hex()} {pool.ctypes.data}", flush=True)
    sys.stdin.read()
