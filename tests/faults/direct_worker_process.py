"""A mock worker in a process of its own, without Triton; says its record on stdout and serves until stdin ends."""

from __future__ import annotations

import asyncio
import sys
import tempfile

from kelp.build.worker import build_worker
from kelp.core.config import load_config
from kelp.core.metrics import Metrics
from kelp.core.types import Role
from kelp.registry.directory import DirectoryRegistry
from kelp.worker.service import WorkerIdentity


async def main(epoch: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as registry:
        parameters = {
            "model.path": model,
            "executor.engine": "mock",
            "executor.num_blocks": "16384",
            "mock.timing.step_s": "0.005",
            "mock.tokens_per_step": "64",
            "handoff.transport": "local",
            "direct.stall_timeout_s": "1.0",
            "registry.path": registry,
        }
        identity = WorkerIdentity("decode", Role.DECODE, "127.0.0.1:1", epoch)
        service = await asyncio.to_thread(build_worker, identity, load_config(parameters), Metrics())
        await service.start()
        (record,) = DirectoryRegistry(load_config(parameters).registry.path, 60.0).snapshot()
        print(record.direct_endpoint, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await service.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
