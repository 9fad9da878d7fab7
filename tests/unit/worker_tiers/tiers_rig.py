"""Workers' tiers over mock engines, a real block manager with a real arena, and the local transport.

The mock checks every byte that is brought: wrong ones fail the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kelp.client.base import WorkerAddress
from kelp.core.clock import SystemClock
from kelp.core.config import ExecutorConfig, KelpConfig, MockConfig, load_config
from kelp.core.errors import DeadlineExceeded, KelpError, WorkerLost
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.kv_manager_messages import Operation, Result, SpaceRecord
from kelp.core.messages import SamplingParams
from kelp.core.metrics import MetricFamily, Metrics
from kelp.core.types import Role, SequenceHash
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, Failed, Tokens
from kelp.executor.mock.executor import MockExecutor
from kelp.executor.mock.load import load_mock_executor
from kelp.kv.eviction.catalogue import make_policy
from kelp.kv.manager.parts import ManagerParts, Tiers
from kelp.kv.manager.service import KvBlockManager
from kelp.kv.tiers.arena import open_arena
from kelp.registry.base import KvManagerRecord
from kelp.transport.layout import pool_region
from kelp.transport.local import LocalAgent, ReadFaults
from kelp.worker.tiers import TierParts, WorkerTiers
from support.waiting import until

BLOCK_SIZE = 8
NUM_BLOCKS = 24
SEED = seed_hash("rig")
PROMPT = list(range(1, 3 * BLOCK_SIZE + 3))
"""Three full blocks and two tokens."""
_ids = itertools.count()


def names_of(prompt: Sequence[int]) -> list[SequenceHash]:
    return sequence_hashes(prompt, BLOCK_SIZE, SEED)


@dataclass
class ManagerHost:
    """Where managers live, one after the other; implements `KvManagerClient` for everybody.

    Attributes:
        gates: Operations of these types wait until the test lets them go on.
        errors: Operations of these types are answered with the error, as long as it stands here.
    """

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    manager: KvBlockManager | None = None
    host: str = ""
    gates: dict[type[Operation], asyncio.Event] = field(default_factory=dict)
    errors: dict[type[Operation], KelpError] = field(default_factory=dict)
    calls: list[Operation] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    faults: ReadFaults = field(default_factory=ReadFaults)

    def start(self) -> KvBlockManager:
        config = load_config(
            {
                "events.enabled": "false",
                "kv_manager.arena_folder": str(self.folder),
                "kv_manager.host_bytes": str(512 * 1024),
                **self.settings,
            }
        )

        def open_tiers(space: SpaceRecord, block_bytes: int) -> Tiers:
            return Tiers(open_arena(config.kv_manager, space, block_bytes), None, None)

        parts = ManagerParts(
            open_tiers=open_tiers,
            open_agent=lambda: LocalAgent(f"manager {next(_ids)}", self.faults),
            make_policy=lambda num_slots: make_policy("lru", num_slots),
            config=config,
            clock=SystemClock(),
            metrics=self.metrics,
        )
        self.manager = KvBlockManager(parts)
        return self.manager

    async def stop(self, is_kept: bool = False) -> None:
        """`is_kept`: what it holds is found again by the next one, as after a crash."""
        manager, self.manager = self.manager, None
        if manager is not None:
            await manager.stop(is_kept)

    def records(self) -> list[KvManagerRecord]:
        if self.manager is None:
            return []
        record = KvManagerRecord(
            manager_id="host:1/kv", epoch=self.manager.epoch, host=self.host, endpoint="host:1", model_name="kv"
        )
        return [record]

    async def call(self, address: WorkerAddress, operations: Sequence[Operation], timeout_s: float) -> list[Result]:
        self.calls += operations
        for operation in operations:
            if (error := self.errors.get(type(operation))) is not None:
                raise error
        # Not `wait_for`: up to Python 3.11 it swallows a cancellation that comes with the answer.
        answering = asyncio.ensure_future(self._answer(operations))
        try:
            done, _ = await asyncio.wait({answering}, timeout=timeout_s)
        finally:
            answering.cancel()
        if not done:
            raise DeadlineExceeded(f"no answer within {timeout_s} s")
        return answering.result()

    async def _answer(self, operations: Sequence[Operation]) -> list[Result]:
        for operation in operations:
            if (gate := self.gates.get(type(operation))) is not None:
                await gate.wait()
        if self.manager is None:
            raise WorkerLost("nobody listens")
        return await self.manager.answer(operations)

    async def close(self) -> None:
        """The channels of one worker; there are none."""

    def num_calls(self, kind: type[Operation]) -> int:
        return sum(isinstance(operation, kind) for operation in self.calls)

    def held(self) -> tuple[int, int, int]:
        """Leases, stores and references."""
        space = None if self.manager is None else self.manager.space
        if space is None:
            return (0, 0, 0)
        return (len(space.host.leases), len(space.stores), space.host.shelf.slots.num_references)


class Life:
    """Events of one request."""

    def __init__(self) -> None:
        self.events: list[ExecutorEvent] = []

    @property
    def end(self) -> Completed | Failed | None:
        return next((event for event in self.events if isinstance(event, Completed | Failed)), None)

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Tokens) for token in event.token_ids]


class Worker:
    """One worker's engine and tiers."""

    def __init__(self, host: ManagerHost, folder: Path, name: str = "w", **settings: str) -> None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": 64, "max_position_embeddings": 4096}))
        executor = ExecutorConfig(
            engine="mock", dtype="float32", block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_step_tokens=64
        )
        self.executor: MockExecutor = load_mock_executor(folder, executor, MockConfig(speedup=0))
        self.host = host
        self.name = name
        self.faults = ReadFaults()
        self.metrics = Metrics()
        self.changes: list[str] = []
        self.usage: dict[str, int | tuple[int, ...]] = {}
        self.times_ns: dict[str, int] = {}
        self._agent = LocalAgent(name, self.faults)
        memory = self.executor.pool_memory
        self._agent.register(pool_region(self.executor.layout, memory.base_address, "cpu"), memory.owner)
        config: KelpConfig = load_config(
            {"registry.heartbeat_s": "0.02", "offload.onboard": "always", "offload.call_timeout_s": "1", **settings}
        )
        parts = TierParts(
            key=(name, f"epoch {next(_ids)}"),
            name=name,
            executor=self.executor,
            agent=self._agent,
            client=host,
            managers=host.records,
            clock=SystemClock(),
            metrics=self.metrics,
            config=config,
        )
        self.tiers = WorkerTiers(parts)
        self._seen: dict[tuple[MetricFamily, tuple[tuple[str, str], ...]], float] = {}

    async def join(self) -> None:
        await until(lambda: self.tiers.manager_id != "", "joined")

    async def run(self, prompt: Sequence[int] = PROMPT, **fields) -> Life:
        """One request to its end, as the worker's service runs it."""
        life = Life()
        await self._run(life, prompt, **fields)
        return life

    def start(self, prompt: Sequence[int] = PROMPT, **fields) -> tuple[Life, asyncio.Task[None]]:
        life = Life()
        return life, asyncio.ensure_future(self._run(life, prompt, **fields))

    async def _run(self, life: Life, prompt: Sequence[int], **fields) -> None:
        max_tokens = fields.pop("max_tokens", 3)
        known_blocks = fields.pop("known_blocks", None)
        request = ExecutorRequest(
            request_id=f"r{next(_ids)}",
            prompt=np.array(prompt, np.int32),
            role=fields.pop("role", Role.AGGREGATED),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            seed_hash=fields.pop("seed_hash", SEED),
            sink=life.events.append,
            **fields,
        )
        async with self.tiers.onboarding(request, self, known_blocks) as changed:
            self.executor.submit(changed)
            try:
                await until(lambda: life.end is not None, "the end of a request")
            except BaseException:
                self.executor.abort(request.request_id)
                raise

    def note_usage(self, **usage: int | tuple[int, ...]) -> None:
        self.usage = usage

    def note_time(self, **times_ns: int) -> None:
        self.times_ns |= times_ns

    async def stored(self, prompt: Sequence[int] = PROMPT, count: int | None = None) -> None:
        """Wait until the manager has the prompt's blocks."""
        names = names_of(prompt)[:count]

        def are_there() -> bool:
            space = None if self.host.manager is None else self.host.manager.space
            return space is not None and all(name in space.host.shelf for name in names)

        await until(are_there, "blocks below")

    async def forget(self) -> None:
        """Evict everything from the engine's own pool."""
        for number in range(2):
            tokens = [60 + number] * (NUM_BLOCKS * BLOCK_SIZE - 2)
            life = await self.run(tokens, seed_hash=seed_hash(f"flood {next(_ids)}"), max_tokens=1)
            assert isinstance(life.end, Completed), life.end
        await until(lambda: self.executor.count_cached(names_of(PROMPT)) == 0, "eviction")

    def counted(self, family: MetricFamily, **labels: str) -> float:
        """A counter or gauge, summed over what the labels leave open."""
        counters, gauges, _ = self.metrics.take()
        for key, value in counters.items():
            self._seen[key] = self._seen.get(key, 0.0) + value
        self._seen.update(gauges)
        wanted = set(labels.items())
        return sum(value for (known, at), value in self._seen.items() if known is family and wanted <= set(at))

    async def quiet(self) -> None:
        """Wait until nothing is held for anybody."""

        def is_quiet() -> bool:
            load = self.executor.load()
            num_free = load.num_free_blocks + load.num_cached_blocks
            return num_free == NUM_BLOCKS and not load.num_running and not self.num_pinned

        await until(is_quiet, f"a quiet worker: {self.executor.load()} {self.num_pinned}")
        await until(lambda: self.host.held() == (0, 0, 0), f"a quiet manager: {self.host.held()}")

    @property
    def num_pinned(self) -> int:
        return self.executor._pool.num_pinned

    async def close(self) -> None:
        await self.tiers.stop()
        await asyncio.to_thread(self.executor.close)
        self.executor._pool.check_integrity()
        await asyncio.to_thread(self.tiers.close)
        self._agent.close()


@contextlib.asynccontextmanager
async def open_rig(
    folder: Path, num_workers: int = 1, manager: dict[str, str] | None = None, **settings: str
) -> AsyncIterator[tuple[ManagerHost, list[Worker]]]:
    """A running manager and workers that have joined it."""
    host = ManagerHost(folder / "arena", settings=manager or {}, host=socket.gethostname())
    host.start()
    workers = [Worker(host, folder, f"w{index}", **settings) for index in range(num_workers)]
    try:
        for worker in workers:
            worker.tiers.start(lambda worker=worker: worker.changes.append(worker.tiers.manager_id))
            await worker.join()
        yield host, workers
    finally:
        for gate in host.gates.values():
            gate.set()
        for worker in workers:
            await worker.close()
        await host.stop()
