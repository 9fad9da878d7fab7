"""A block manager over NIXL and a mapped arena, in its own process; batches come and go as lines of hex digits."""

from __future__ import annotations

import asyncio
import sys

from kelp.build.kv_manager import build_kv_manager
from kelp.core.config import load_config
from kelp.core.metrics import Metrics


async def main() -> None:
    parameters = dict(argument.split("=", 1) for argument in sys.argv[1:])
    manager = build_kv_manager(load_config(parameters), "manager", Metrics())
    loop = asyncio.get_running_loop()
    print("READY", flush=True)
    while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        print("RESULT " + (await manager.handle(bytes.fromhex(line))).hex(), flush=True)
    await manager.stop()


if __name__ == "__main__":
    asyncio.run(main())
