"""A prefill worker's half of one handoff over NIXL, in its own process; commands arrive on stdin, one a line."""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np

from kelp.core.config import HandoffConfig
from kelp.core.types import BlockId, KVLayout
from kelp.kv.handoff import HandoffServer
from kelp.transport.layout import describe_pool, pool_region
from kelp.transport.nixl import NixlAgent

LAYOUT = KVLayout(16, num_layers=2, num_kv_heads=2, block_size=16, head_dim=64, dtype="bfloat16", model_id="m")


async def main() -> None:
    pool = np.repeat(np.arange(LAYOUT.num_blocks, dtype=np.uint8), LAYOUT.block_bytes)
    agent = NixlAgent("prefill")
    region = pool_region(LAYOUT, pool.ctypes.data, "cpu")
    agent.register(region, pool)
    server = HandoffServer(describe_pool(agent, LAYOUT, region, "prefill", "epoch-1"), HandoffConfig())
    endpoint = await server.start("127.0.0.1")
    released = asyncio.Event()
    offer = server.offer("h", released.set)
    print("READY " + json.dumps({"endpoint": endpoint}), flush=True)
    loop = asyncio.get_running_loop()
    while command := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        if command == "announce":
            offer.announce(32, [BlockId(11), BlockId(4)])
        elif command == "finish":
            offer.announce(40, [BlockId(9)])
            offer.finish(42, -0.5)
            await released.wait()
            print("RELEASED", flush=True)
    await server.stop()
    agent.close()


if __name__ == "__main__":
    asyncio.run(main())
