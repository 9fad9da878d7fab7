"""A worker's engine and tiers under a load that never ends: the mock, which checks every byte, over NIXL.

Arguments: name, model folder, then `key=value` settings. Each answer is compared with what an engine without tiers
says. Prints `DONE <requests> <onboarded blocks>` now and then, and what `kv_witness` has to say; on SIGUSR1 goes on to
prompts that nobody has computed yet; on SIGTERM lets everything end, and prints CLEAN if nothing is held any more.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
from kv_witness import Witness

from kelp.client.grpc.kv_manager import GrpcKvManagerClient
from kelp.core.clock import SystemClock
from kelp.core.config import ExecutorConfig, KelpConfig, MockConfig, load_config
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.metrics import ONBOARD_BLOCKS, Metrics
from kelp.core.types import Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, Failed, Tokens
from kelp.executor.mock.executor import MockExecutor
from kelp.executor.mock.load import load_mock_executor
from kelp.registry.directory import KvManagerDirectory
from kelp.transport import open_agent
from kelp.transport.layout import pool_region
from kelp.worker.tiers import TierParts, WorkerTiers

BLOCK_SIZE = 16
NUM_BLOCKS = 48
NUM_PROMPTS = 12
NUM_AT_ONCE = 4
NUM_TOKENS = 6


def engine(folder: Path, num_blocks: int) -> MockExecutor:
    executor = ExecutorConfig(
        engine="mock", dtype="float32", block_size=BLOCK_SIZE, num_blocks=num_blocks, max_step_tokens=128
    )
    return load_mock_executor(folder, executor, MockConfig(speedup=0))


def prompt_of(number: int) -> list[int]:
    """Pairs of prompts share their first half."""
    generator = random.Random(number // 2)
    head = [generator.randrange(1, 60) for _ in range(6 * BLOCK_SIZE)]
    own = random.Random(1000 + number)
    return head + [own.randrange(1, 60) for _ in range(5 * BLOCK_SIZE + number % NUM_PROMPTS)]


class Nobody:
    """Has no use for what a request cost."""

    def note_usage(self, **counts: int | tuple[int, ...]) -> None:
        pass

    def note_time(self, **times_ns: int) -> None:
        pass


class Load:
    def __init__(self, name: str, folder: Path, config: KelpConfig) -> None:
        self.executor = engine(folder, NUM_BLOCKS)
        self._plain = engine(folder, 1024)
        self.metrics = Metrics()
        self._agent = open_agent("nixl", f"{name}:{uuid.uuid4().hex[:8]}")
        memory = self.executor.pool_memory
        self._agent.register(pool_region(self.executor.layout, memory.base_address, "cpu"), memory.owner)
        parts = TierParts(
            key=(name, uuid.uuid4().hex),
            name=name,
            executor=self.executor,
            agent=self._agent,
            client=Witness(GrpcKvManagerClient()),
            managers=KvManagerDirectory(config.registry.path, config.registry.expiry_s).snapshot,
            clock=SystemClock(),
            metrics=self.metrics,
            config=config,
        )
        self.tiers = WorkerTiers(parts)
        self._expected: dict[int, list[int]] = {}
        self._num_done = 0
        self._first_prompt = 0
        self.is_stopping = False

    async def run(self) -> None:
        self.tiers.start(lambda: None)
        print("READY", flush=True)
        await asyncio.gather(*(self._go_on(random.Random(index)) for index in range(NUM_AT_ONCE)), self._tell())

    def go_on_to_other_prompts(self) -> None:
        """From now on."""
        self._first_prompt += NUM_PROMPTS

    async def close(self) -> None:
        """Wait until nothing is held."""
        self._plain.close()
        pool = self.executor._pool
        for _ in range(200):
            if pool.num_held == pool.num_pinned == 0:
                break
            await asyncio.sleep(0.05)
        assert pool.num_held == pool.num_pinned == 0, (pool.num_held, pool.num_pinned)
        await self.tiers.stop()
        self.executor.close()
        pool.check_integrity()
        self.tiers.close()
        self._agent.close()

    async def _go_on(self, generator: random.Random) -> None:
        while not self.is_stopping:
            number = self._first_prompt + generator.randrange(NUM_PROMPTS)
            if number not in self._expected:
                self._expected[number] = await self._answer(self._plain, self._request(number))
            async with self.tiers.onboarding(self._request(number), Nobody()) as request:
                tokens = await self._answer(self.executor, request, generator)
            assert tokens == self._expected[number][: len(tokens)], f"prompt {number}: {tokens}"
            self._num_done += 1
            await asyncio.sleep(0.002)

    def _request(self, number: int) -> ExecutorRequest:
        return ExecutorRequest(
            request_id=uuid.uuid4().hex,
            prompt=np.array(prompt_of(number), np.int32),
            role=Role.AGGREGATED,
            sampling=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True),
            seed_hash=seed_hash("faults"),
            sink=lambda _: None,
        )

    async def _answer(
        self, executor: MockExecutor, request: ExecutorRequest, generator: random.Random | None = None
    ) -> list[int]:
        loop = asyncio.get_running_loop()
        tokens: list[int] = []
        over: asyncio.Future[Completed | Failed] = loop.create_future()
        pass_on = request.sink

        def sink(event: ExecutorEvent) -> None:
            pass_on(event)
            if isinstance(event, Tokens):
                tokens.extend(event.token_ids)
            elif isinstance(event, Completed | Failed):
                loop.call_soon_threadsafe(over.set_result, event)

        executor.submit(replace(request, sink=sink))
        if generator is not None and generator.random() < 0.1:
            await asyncio.sleep(generator.random() * 0.01)
            executor.abort(request.request_id)
        end = await over
        assert isinstance(end, Completed), end
        return tokens

    async def _tell(self) -> None:
        num_onboarded = 0.0
        while not self.is_stopping:
            counters, _, _ = self.metrics.take()
            num_onboarded += sum(
                value
                for (family, labels), value in counters.items()
                if family is ONBOARD_BLOCKS and ("outcome", "onboarded") in labels
            )
            print(f"DONE {self._num_done} {int(num_onboarded)}", flush=True)
            await asyncio.sleep(0.05)


async def main(name: str, folder: Path, settings: dict[str, str]) -> None:
    load = Load(name, folder, load_config(settings))

    def stop() -> None:
        load.is_stopping = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, load.go_on_to_other_prompts)
    await load.run()
    await load.close()
    print("CLEAN", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("UCX_MODULES", "^efa")
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), dict(argument.split("=", 1) for argument in sys.argv[3:])))
