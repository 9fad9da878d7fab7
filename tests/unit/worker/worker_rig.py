"""A whole worker over an executor that a test plays; handoffs over real gRPC and the local transport."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np

from kelp.client.base import WorkerAddress
from kelp.core.clock import SystemClock
from kelp.core.config import HandoffConfig, KelpConfig, RegistryConfig, RouterConfig, ServerConfig
from kelp.core.config_replicas import DirectConfig
from kelp.core.config_resilience import DrainConfig, WatchdogConfig
from kelp.core.errors import KelpError, WorkerLost
from kelp.core.messages import (
    WORKER_EVENT,
    WORKER_STATUS,
    Finished,
    GenerateCommand,
    Progress,
    Rendezvous,
    RequestTimings,
    RequestUsage,
    SamplingParams,
    WorkerStatus,
)
from kelp.core.metrics import Metrics
from kelp.core.peer_auth import PeerToken
from kelp.core.types import BlockId, FinishReason, HandoffShape, KVLayout, Role
from kelp.core.wire import Message, decode_message, encode_message
from kelp.executor.base import (
    Completed,
    ExecutorEvent,
    ExecutorLimits,
    ExecutorLoad,
    ExecutorRequest,
    Failed,
    PoolMemory,
    Prefilled,
    Reserved,
    Tokens,
)
from kelp.kv.events import EventPublisher
from kelp.kv.handoff import HandoffReader, HandoffServer
from kelp.registry.base import WorkerRecord
from kelp.transport.layout import describe_pool, pool_region
from kelp.transport.local import LocalAgent, ReadFaults
from kelp.worker.service import WorkerIdentity, WorkerParts, WorkerService
from support.exchange import FakeExchange, bytes_tensor
from support.waiting import until

LAYOUT = KVLayout(16, num_layers=1, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", model_id="m")
PROMPT = np.arange(100, 108, dtype=np.int32)
"""Two full blocks."""


class FakeExecutor:
    """An engine that does what the test says; `calls` is everything the worker asked of it but `submit`."""

    handoff_shape = HandoffShape.RENDEZVOUS
    limits = ExecutorLimits(max_model_tokens=64, vocab_size=1000, eos_token_ids=(0,))

    def __init__(self, layout: KVLayout = LAYOUT) -> None:
        self.layout = layout
        self.pool = np.zeros((layout.num_blocks, layout.block_bytes), dtype=np.uint8)
        self.pool_memory = PoolMemory(self.pool.ctypes.data, self.pool.nbytes, "cpu", self.pool)
        self.requests: list[ExecutorRequest] = []
        self.calls: list[tuple[str, int]] = []
        self.imported: list[tuple[int, float, int]] = []
        self.refusal: KelpError | None = None
        self.is_closed = False
        self.num_draft_tokens = 0
        self.step_s = 0.0
        self.num_failed_steps = 0
        self.num_loads = 0

    def submit(self, request: ExecutorRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)

    def abort(self, request_id: str) -> None:
        self._note("abort", request_id)

    def complete_import(self, request_id: str, first_token: int, first_log_prob: float, num_transferred: int) -> None:
        self._note("complete_import", request_id)
        self.imported.append((first_token, first_log_prob, num_transferred))

    def fail_import(self, request_id: str) -> None:
        self._note("fail_import", request_id)

    def end_import(self, request_id: str) -> None:
        self._note("end_import", request_id)

    def release_export(self, request_id: str) -> None:
        self._note("release_export", request_id)

    def load(self) -> ExecutorLoad:
        self.num_loads += 1
        num_drafts = self.num_draft_tokens
        return ExecutorLoad(
            num_running=len(self.requests),
            num_waiting=0,
            num_free_blocks=self.layout.num_blocks,
            num_cached_blocks=0,
            num_preemptions=0,
            num_draft_tokens=num_drafts,
            num_accepted_tokens=num_drafts // 2,
            step_s=self.step_s,
            num_failed_steps=self.num_failed_steps,
        )

    def close(self) -> None:
        self.is_closed = True
        for number in range(len(self.requests)):
            self.emit(Failed(WorkerLost("the executor is closing")), number=number)

    def emit(self, *events: ExecutorEvent, number: int = -1) -> None:
        """Tell the worker about a request, from a foreign thread as engines do."""
        sink = self.requests[number].sink

        def tell() -> None:
            for event in events:
                sink(event)

        thread = threading.Thread(target=tell)
        thread.start()
        thread.join()

    def names(self) -> list[str]:
        """What was asked, in order."""
        return [name for name, _ in self.calls]

    def _note(self, name: str, request_id: str) -> None:
        numbers = {request.request_id: number for number, request in enumerate(self.requests)}
        self.calls.append((name, numbers.get(request_id, -1)))


class FakeRegistry:
    """Keeps everything published; may be out of reach."""

    def __init__(self) -> None:
        self.published: list[WorkerRecord] = []
        self.withdrawn: list[tuple[str, str]] = []
        self.error: OSError | None = None

    def publish(self, record: WorkerRecord) -> None:
        if self.error is not None:
            raise self.error
        self.published.append(record)

    def withdraw(self, worker_id: str, epoch: str) -> None:
        if self.error is not None:
            raise self.error
        self.withdrawn.append((worker_id, epoch))

    def snapshot(self) -> list[WorkerRecord]:
        raise NotImplementedError


@dataclass
class WorkerRig:
    """One worker."""

    service: WorkerService
    executor: FakeExecutor
    registry: FakeRegistry
    handoffs: HandoffServer
    reader: HandoffReader
    faults: ReadFaults
    metrics: Metrics
    agent: LocalAgent
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        """Of the handoff service."""
        return self.registry.published[-1].handoff_endpoint

    @property
    def address(self) -> WorkerAddress:
        """As a router knows it."""
        record = self.registry.published[-1]
        return WorkerAddress(record.endpoint, record.model_name, record.direct_endpoint, record.epoch)

    def rendezvous(self, handoff_id: str = "h") -> Rendezvous:
        """A meeting with this worker as prefill side."""
        return Rendezvous(handoff_id=handoff_id, endpoint=self.endpoint, prefill_epoch="epoch")

    def send(self, **inputs: object) -> tuple[FakeExchange, asyncio.Task[None]]:
        """Raw input tensors."""
        exchange = FakeExchange(inputs)  # type: ignore[arg-type]
        task = asyncio.ensure_future(self.service.handle(exchange))
        self.tasks.append(task)
        return exchange, task

    def command(self, message: Message) -> tuple[FakeExchange, asyncio.Task[None]]:
        return self.send(command=bytes_tensor(encode_message(message)))

    async def generate(
        self, role: Role = Role.AGGREGATED, rendezvous: Rendezvous | None = None, **fields: object
    ) -> tuple[FakeExchange, asyncio.Task[None]]:
        """Send a request and wait until the executor has it, or it has been refused."""
        num_requests = len(self.executor.requests)
        document = generate_command(role, rendezvous, **fields)
        exchange, task = self.send(command=bytes_tensor(encode_message(document)), input_ids=PROMPT)
        await until(lambda: len(self.executor.requests) > num_requests or task.done(), "submission")
        return exchange, task

    async def status(self) -> WorkerStatus:
        exchange, task = self.send(command=bytes_tensor(b'{"op": "status"}'))
        await task
        return decode_message(WORKER_STATUS, exchange.responses[0]["event"][0], "status")


def generate_command(role: Role, rendezvous: Rendezvous | None, **fields: object) -> GenerateCommand:
    return GenerateCommand.model_validate(
        {
            "request_id": "r",
            "role": role,
            "sampling": SamplingParams(),
            "seed_hash_hex": "ab" * 16,
            "rendezvous": rendezvous,
            **fields,
        }
    )


def events(exchange: FakeExchange) -> list[Progress | Finished]:
    """What the worker told beside tokens."""
    raw = [response["event"][0] for response in exchange.responses if "event" in response]
    return [decode_message(WORKER_EVENT, document, "event") for document in raw]


def last(exchange: FakeExchange) -> Finished:
    assert exchange.is_over
    event = events(exchange)[-1]
    assert isinstance(event, Finished)
    return event


def completed(reason: FinishReason | None = FinishReason.LENGTH, **usage: int) -> Completed:
    return Completed(reason, RequestUsage(**usage), RequestTimings(last_token_ns=9))


def token(token_id: int) -> Tokens:
    return Tokens((token_id,), (-0.5,))


def prefilled(num_tokens: int, *block_ids: int) -> Prefilled:
    return Prefilled(num_tokens, tuple(map(BlockId, block_ids)))


def reserved(*block_ids: int, num_cached: int = 0) -> Reserved:
    return Reserved(tuple(map(BlockId, block_ids)), num_cached)


@contextlib.asynccontextmanager
async def open_worker(
    role: Role = Role.DECODE,
    idle_timeout_s: float = 60.0,
    heartbeat_s: float = 60.0,
    executor: FakeExecutor | None = None,
    events: EventPublisher | None = None,
    tags: dict[str, str] | None = None,
    direct: DirectConfig | None = None,
    grace_s: float = 60.0,
    step_timeout_s: float = 60.0,
    end_after_s: float = 60.0,
    token: PeerToken | None = None,
    **handoff: float,
) -> AsyncIterator[WorkerRig]:
    """A started worker; `handoff` overrides `HandoffConfig`. Stopped at the end, unless the test has done it."""
    settings = HandoffConfig.model_validate({"transport": "local", **handoff})
    config = KelpConfig(
        handoff=settings,
        direct=direct or DirectConfig(),
        drain=DrainConfig(grace_s=grace_s),
        watchdog=WatchdogConfig(step_timeout_s=step_timeout_s, end_after_s=end_after_s),
        router=RouterConfig(cancel_poll_s=0.002, idle_timeout_s=idle_timeout_s),
        registry=RegistryConfig(heartbeat_s=heartbeat_s),
        server=ServerConfig(tags=tags or {}),
    )
    executor = executor or FakeExecutor()
    registry, faults, clock, metrics = FakeRegistry(), ReadFaults(), SystemClock(), Metrics()
    agent = LocalAgent(role.value, faults)
    region = pool_region(LAYOUT, executor.pool_memory.base_address, "cpu")
    agent.register(region, executor.pool)
    handoffs = HandoffServer(describe_pool(agent, LAYOUT, region, role.value, "epoch"), settings, clock)
    reader = HandoffReader(agent, LAYOUT, settings, clock)
    parts = WorkerParts(executor, handoffs, reader, agent, registry, clock, metrics, events, token=token)
    service = WorkerService(WorkerIdentity(role.value, role, "host:1", "epoch"), parts, config)
    await service.start()
    rig = WorkerRig(service, executor, registry, handoffs, reader, faults, metrics, agent)
    try:
        yield rig
    finally:
        for task in rig.tasks:
            task.cancel()
        await asyncio.gather(*rig.tasks, return_exceptions=True)
        if not executor.is_closed:
            await service.stop()
