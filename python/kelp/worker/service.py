"""The worker as a whole: takes commands, runs them on the executor, tells the registry how it is."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kelp.core.cancel_watch import CancelWatch
from kelp.core.clock import Clock
from kelp.core.config import KelpConfig
from kelp.core.errors import InvalidRequest, KelpError, RequestCancelled, WorkerLost
from kelp.core.exchange import Exchange, Tensors
from kelp.core.messages import WORKER_COMMAND, CancelCommand, DrainCommand, Finished, GenerateCommand, WorkerStatus
from kelp.core.metrics import ACCEPTED_TOKENS, BLOCKS, DRAFT_TOKENS, LEASES, RUNNING, Metrics
from kelp.core.outbox import Outbox
from kelp.core.types import Role, SequenceHash, WorkerState
from kelp.core.wire import decode_message, encode_message
from kelp.executor.base import Executor, ExecutorRequest
from kelp.kv.events import EventPublisher
from kelp.kv.handoff import HandoffReader, HandoffServer
from kelp.registry.base import LayoutRecord, Registry, WorkerRecord
from kelp.transport.base import Agent
from kelp.worker.decode import DecodeRun
from kelp.worker.prefill import run_prefill
from kelp.worker.presence import Presence
from kelp.worker.running import RunningRequests, cancel_tasks
from kelp.worker.stream import RequestStream, StreamItem

_KEEP_ALIVES_PER_IDLE_TIMEOUT = 4
_DRAIN_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a worker is made of; `build.py` puts it together. Without `events` routers guess what it holds."""

    executor: Executor
    handoffs: HandoffServer
    reader: HandoffReader
    agent: Agent
    registry: Registry
    clock: Clock
    metrics: Metrics
    events: EventPublisher | None = None


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who this worker is; `epoch` is new with every incarnation."""

    model_name: str
    role: Role
    endpoint: str
    epoch: str

    @property
    def worker_id(self) -> str:
        """Name in the registry, stable over restarts."""
        return f"{self.endpoint}/{self.model_name}"


class WorkerService:
    """One worker. Everything but the constructor belongs to one event loop."""

    def __init__(self, identity: WorkerIdentity, parts: WorkerParts, config: KelpConfig) -> None:
        self._identity = identity
        self._parts = parts
        self._config = config
        self._state = WorkerState.STARTING
        self._handoff_endpoint = ""
        self._streams: dict[str, RequestStream] = {}
        self._running = RunningRequests()
        self._tasks: list[asyncio.Task[None]] = []
        self._quarantined: set[asyncio.Task[None]] = set()
        self._outbox: Outbox[StreamItem] = Outbox(f"{identity.model_name}-outbox")
        self._cancel_watch = CancelWatch(config.router.cancel_poll_s)

    async def start(self) -> None:
        """Open the handoff service and become visible."""
        self._presence = Presence(self._parts.registry, self._record, self._config.registry.heartbeat_s)
        self._handoff_endpoint = await self._parts.handoffs.start(self._config.handoff.host)
        if self._parts.events is not None:
            self._parts.events.start()
            self._parts.executor.watch_kv(self._parts.events.sink)
        self._state = WorkerState.READY
        await self._presence.publish()
        loops = (self._presence.run(), self._keep_alive(), self._report())
        self._tasks = [asyncio.ensure_future(loop) for loop in loops]

    async def stop(self) -> None:
        """Leave the registry and let go of everything; running requests fail with KELP_WORKER_LOST."""
        self._state = WorkerState.GONE
        for task in self._tasks:
            task.cancel()
        await self._presence.withdraw()
        await self._parts.handoffs.stop()
        await self._running.cancel_all()
        await cancel_tasks(self._quarantined)
        await self._parts.reader.close()
        await asyncio.to_thread(self._close_threads)

    async def handle(self, exchange: Exchange) -> None:
        """Serve one command to its end.

        Raises:
            KelpError: For the guard to send; nothing of the request is held any more.
        """
        inputs = exchange.inputs()
        if "command" not in inputs or inputs["command"].size != 1:
            raise InvalidRequest("command: exactly one JSON document is required")
        command = decode_message(WORKER_COMMAND, bytes(inputs["command"].reshape(-1)[0]), "command")
        if isinstance(command, GenerateCommand):
            await self._generate(command, _prompt(inputs), exchange)
            return
        if isinstance(command, CancelCommand):
            self._running.cancel(command.request_id)
        elif isinstance(command, DrainCommand):
            await self._drain(command.timeout_s)
        document = np.array([encode_message(self.status())], dtype=np.object_)
        exchange.send({"event": document}, is_final=True)

    def status(self) -> WorkerStatus:
        """What the worker holds right now."""
        load = self._parts.executor.load()
        return WorkerStatus(
            worker=self._identity.worker_id,
            epoch=self._identity.epoch,
            role=self._identity.role,
            state=self._state.value,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_blocks=self._parts.executor.layout.num_blocks,
            num_free_blocks=load.num_free_blocks,
            num_cached_blocks=load.num_cached_blocks,
            num_leases=self._parts.handoffs.num_leases,
            num_preemptions=load.num_preemptions,
        )

    async def _generate(self, command: GenerateCommand, prompt: npt.NDArray[np.int32], exchange: Exchange) -> None:
        if self._state is not WorkerState.READY:
            raise WorkerLost(f"worker {self._identity.worker_id} is {self._state.value}")
        stream = RequestStream(exchange, self._outbox, self._parts.clock)
        # A retried request may come back while its first attempt still winds down: ids are per attempt.
        request_id = f"{command.request_id}#{uuid.uuid4().hex[:8]}"
        request = self._request(command, request_id, prompt, stream)
        loop = asyncio.get_running_loop()
        self._streams[request_id] = stream
        try:
            with (
                self._running.running(command.request_id) as cancel,
                self._cancel_watch.watching(exchange, lambda: loop.call_soon_threadsafe(cancel)),
            ):
                finished = await self._run(command, request, stream)
        except asyncio.CancelledError:
            raise self._why_cancelled() from None
        finally:
            del self._streams[request_id]
        if finished is not None:
            await stream.finish(finished)

    def _why_cancelled(self) -> KelpError:
        if self._state is WorkerState.GONE:
            return WorkerLost(f"worker {self._identity.worker_id} is stopping")
        return RequestCancelled("the client cancelled or went away")

    def _request(
        self,
        command: GenerateCommand,
        request_id: str,
        prompt: npt.NDArray[np.int32],
        stream: RequestStream,
    ) -> ExecutorRequest:
        remaining_s = None if command.remaining_ms is None else command.remaining_ms / 1e3
        return ExecutorRequest(
            request_id=request_id,
            prompt=prompt,
            role=command.role,
            sampling=command.sampling,
            seed_hash=SequenceHash(bytes.fromhex(command.seed_hash_hex)),
            sink=stream.sink,
            num_generated=command.num_generated,
            deadline_s=None if remaining_s is None else time.monotonic() + remaining_s,
            lora_name=command.lora_name,
            lora_digest=command.lora_digest,
        )

    async def _run(self, command: GenerateCommand, request: ExecutorRequest, stream: RequestStream) -> Finished | None:
        """Run to the end; returns the last message, None if it has been sent."""
        executor = self._parts.executor
        if command.role is Role.PREFILL:
            return await run_prefill(executor, self._parts.handoffs, command, request, stream)
        if command.role is Role.DECODE:
            run = DecodeRun(executor, self._parts.reader, command, self._quarantined)
            return await run.run(request, stream)
        stream.end_with_executor()
        executor.submit(request)
        try:
            await stream.wait_over()
        except BaseException:
            executor.abort(request.request_id)
            raise
        return None

    async def _drain(self, timeout_s: float) -> None:
        self._state = WorkerState.DRAINING
        await self._presence.publish()
        deadline_s = self._parts.clock.monotonic_s() + timeout_s
        while self._streams or self._parts.handoffs.num_leases:
            if self._parts.clock.monotonic_s() >= deadline_s:
                return
            await asyncio.sleep(_DRAIN_POLL_S)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._config.router.idle_timeout_s / _KEEP_ALIVES_PER_IDLE_TIMEOUT)
            for stream in self._streams.values():
                stream.keep_alive()

    async def _report(self) -> None:
        metrics, name = self._parts.metrics, self._identity.model_name
        num_drafts = num_accepted = 0
        while True:
            status, load = self.status(), self._parts.executor.load()
            metrics.add(DRAFT_TOKENS, load.num_draft_tokens - num_drafts, worker=name)
            metrics.add(ACCEPTED_TOKENS, load.num_accepted_tokens - num_accepted, worker=name)
            num_drafts, num_accepted = load.num_draft_tokens, load.num_accepted_tokens
            metrics.set(BLOCKS, status.num_free_blocks, worker=name, state="free")
            metrics.set(BLOCKS, status.num_cached_blocks, worker=name, state="cached")
            metrics.set(RUNNING, status.num_running, worker=name, state="running")
            metrics.set(RUNNING, status.num_waiting, worker=name, state="waiting")
            metrics.set(LEASES, status.num_leases, worker=name)
            await asyncio.sleep(self._config.registry.heartbeat_s)

    def _record(self) -> WorkerRecord:
        load, events = self._parts.executor.load(), self._parts.events
        return WorkerRecord(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            model_name=self._identity.model_name,
            role=self._identity.role,
            state=self._state,
            endpoint=self._identity.endpoint,
            handoff_endpoint=self._handoff_endpoint,
            handoff_shape=self._parts.executor.handoff_shape,
            layout=LayoutRecord.of(self._parts.executor.layout),
            events_endpoint="" if events is None else events.endpoint,
            replay_endpoint="" if events is None else events.replay_endpoint,
            max_step_tokens=self._config.executor.max_step_tokens,
            max_running=self._config.executor.max_running,
            tags=self._config.server.tags,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
        )

    def _close_threads(self) -> None:
        self._parts.executor.close()
        if self._parts.events is not None:
            self._parts.events.close()
        self._parts.agent.close()
        self._cancel_watch.close()
        self._outbox.close()


def _prompt(inputs: Tensors) -> npt.NDArray[np.int32]:
    prompt = inputs.get("input_ids")
    if prompt is None or prompt.dtype != np.int32 or prompt.ndim != 1:
        raise InvalidRequest("input_ids: INT32 of shape [num_tokens] is required")
    return prompt
