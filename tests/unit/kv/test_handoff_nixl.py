"""The handoff as it runs in production: another process, NIXL, gRPC."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from handoff_prefill_process import LAYOUT
from handoff_rig import until

from kelp.core.config import HandoffConfig
from kelp.core.errors import FatalTransferError, WorkerLost
from kelp.core.messages import Rendezvous
from kelp.core.types import BlockId
from kelp.kv.handoff import FetchPlan, HandoffReader
from kelp.transport import open_agent
from kelp.transport.layout import pool_region

pytestmark = [
    pytest.mark.nixl,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
        reason="the nixl wheel is not installed",
    ),
]
PLAN = FetchPlan((BlockId(0), BlockId(1), BlockId(2)), num_cached_blocks=0, num_prompt_tokens=40)


class PrefillProcess:
    """Started, and told line by line what to do next."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("handoff_prefill_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        hello = json.loads(self.hear("READY ").removeprefix("READY "))
        self.rendezvous = Rendezvous(handoff_id="h", endpoint=hello["endpoint"], prefill_epoch="epoch-1")

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def hear(self, prefix: str) -> str:
        assert self._process.stdout is not None
        return next(line for line in self._process.stdout if line.startswith(prefix))

    def end(self) -> int:
        self._process.communicate("\n")
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class DecodeHalf:
    """An agent with a pool, and a reader on it."""

    def __init__(self) -> None:
        self.pool = np.full((LAYOUT.num_blocks, LAYOUT.block_bytes), 255, dtype=np.uint8)
        self._agent = open_agent("nixl", "decode")
        self._agent.register(pool_region(LAYOUT, self.pool.ctypes.data, "cpu"), self.pool)
        self.reader = HandoffReader(self._agent, LAYOUT, HandoffConfig(attach_timeout_s=10.0))

    async def close(self) -> None:
        await self.reader.close()
        self._agent.close()


def test_kv_moves_between_processes_while_the_prefill_goes_on() -> None:
    prefill = PrefillProcess()

    async def scenario() -> None:
        decode = DecodeHalf()
        fetch = asyncio.create_task(decode.reader.fetch(prefill.rendezvous, PLAN))
        prefill.say("announce")
        await until(lambda: decode.pool[:2, -1].tolist() == [11, 4], timeout_s=30)
        assert not fetch.done()
        prefill.say("finish")
        assert (await fetch).first_token == 42
        assert (decode.pool[:3] == np.array([[11], [4], [9]], dtype=np.uint8)).all()
        assert (decode.pool[3:] == 255).all()
        await asyncio.get_running_loop().run_in_executor(None, prefill.hear, "RELEASED")
        await decode.close()

    try:
        asyncio.run(scenario())
        assert prefill.end() == 0
    finally:
        prefill.kill()


def test_a_prefill_process_killed_in_the_middle_fails_the_fetch_at_once() -> None:
    prefill = PrefillProcess()

    async def scenario() -> None:
        decode = DecodeHalf()
        fetch = asyncio.create_task(decode.reader.fetch(prefill.rendezvous, PLAN))
        prefill.say("announce")
        await until(lambda: decode.pool[:2, -1].tolist() == [11, 4], timeout_s=30)
        prefill.kill()
        with pytest.raises((WorkerLost, FatalTransferError)):
            await asyncio.wait_for(fetch, 30.0)
        await until(lambda: decode.reader.num_peers == 0)
        await decode.close()

    try:
        asyncio.run(scenario())
    finally:
        prefill.kill()
