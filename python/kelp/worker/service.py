"""The worker as a whole: takes commands, runs them on the executor, tells the registry how it is."""

from __future__ import annotations

import asyncio
import time
import uuid

import numpy as np
import numpy.typing as npt

from kelp.core.cancel_watch import CancelWatch
from kelp.core.config import KelpConfig
from kelp.core.errors import RequestCancelled, WorkerDraining, WorkerStuck
from kelp.core.exchange import Exchange
from kelp.core.messages import CancelCommand, DrainCommand, Finished, GenerateCommand, StatusCommand, WorkerStatus
from kelp.core.metrics import ACCEPTED_TOKENS, BLOCKS, DRAFT_TOKENS, LEASES, RUNNING
from kelp.core.outbox import Outbox
from kelp.core.types import Role, SequenceHash, WorkerState
from kelp.core.wire import encode_message
from kelp.executor.base import ExecutorRequest
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.worker.channel import Channel, StreamItem
from kelp.worker.decode import DecodeRun
from kelp.worker.direct import DirectServer
from kelp.worker.direct.connection import DirectParts
from kelp.worker.exchange_channel import ExchangeChannel, answer_seal, read_command, read_prompt
from kelp.worker.parts import WorkerIdentity, WorkerParts
from kelp.worker.prefill import run_prefill
from kelp.worker.presence import Presence
from kelp.worker.running import RunningRequests, cancel_tasks
from kelp.worker.stream import RequestStream
from kelp.worker.watchdog import Watchdog

_KEEP_ALIVES_PER_IDLE_TIMEOUT = 4
_DRAIN_POLL_S = 0.05


class WorkerService:
    """One worker. Everything but the constructor belongs to one event loop.

    Attributes:
        direct: Its own socket for routers.
    """

    def __init__(self, identity: WorkerIdentity, parts: WorkerParts, config: KelpConfig) -> None:
        self._identity = identity
        self._parts = parts
        self._config = config
        self._state = WorkerState.STARTING
        self._handoff_endpoint = self._direct_endpoint = ""
        stall_timeout_s = config.direct.stall_timeout_s
        self.direct = DirectServer(DirectParts(self, identity.worker_id, identity.epoch, stall_timeout_s, parts.token))
        self._streams: dict[str, RequestStream] = {}
        self._running = RunningRequests()
        self._tasks: list[asyncio.Task[None]] = []
        self._quarantined: set[asyncio.Task[None]] = set()
        self._showing: set[asyncio.Task[None]] = set()
        self._outbox: Outbox[StreamItem] = Outbox(f"{identity.model_name}-outbox")
        self._cancel_watch = CancelWatch(config.router.cancel_poll_s)

    async def start(self) -> None:
        """Open the handoff service and become visible."""
        self._presence = Presence(self._parts.registry, self._record, self._config.registry.heartbeat_s)
        self._handoff_endpoint = await self._parts.handoffs.start(self._config.handoff.host)
        if self._config.direct.enabled:
            self._direct_endpoint = await self.direct.start(self._config.handoff.host)
        if self._parts.events is not None:
            self._parts.events.start()
            self._parts.executor.watch_kv(self._parts.events.sink)
        if self._parts.tiers is not None:
            self._parts.tiers.start(self._show_manager)
        self._state = WorkerState.READY
        await self._presence.publish()
        self._watchdog = Watchdog(self._parts.executor, self._config.watchdog, self._note_stuck)
        loops = (self._presence.run(), self._keep_alive(), self._report(), self._watchdog.run())
        self._tasks = [asyncio.ensure_future(loop) for loop in loops]

    async def stop(self) -> None:
        """Leave the registry and let go of everything; running requests go on at other workers."""
        self._state = WorkerState.GONE
        for task in self._tasks:
            task.cancel()
        await self._presence.withdraw()
        await self._parts.handoffs.stop()
        self.direct.stop_listening()
        await self._running.end_all(WorkerDraining(f"worker {self._identity.worker_id} is stopping"))
        await self.direct.stop()
        await cancel_tasks(self._quarantined)
        if self._parts.tiers is not None:
            await self._parts.tiers.stop()
        await self._parts.reader.close()
        await asyncio.to_thread(self._close_threads)

    async def handle(self, exchange: Exchange) -> None:
        """Serve one command to its end.

        Raises:
            KelpError: For the guard to send; nothing of the request is held any more.
        """
        inputs = exchange.inputs()
        token, scope = self._parts.token, (self._identity.worker_id, self._identity.epoch)
        command = read_command(inputs, token, scope)
        if isinstance(command, GenerateCommand):
            seal = answer_seal(inputs, token, scope)
            channel = ExchangeChannel(exchange, self._outbox, self._cancel_watch, seal)
            await self.generate(command, read_prompt(inputs), channel)
            return
        if isinstance(command, CancelCommand):
            self._running.cancel(command.request_id)
            command = StatusCommand()
        document = np.array([encode_message(await self.control(command))], dtype=np.object_)
        exchange.send({"event": document}, is_final=True)

    async def control(self, command: DrainCommand | StatusCommand) -> WorkerStatus:
        """Obey, and say what the worker holds then."""
        if isinstance(command, DrainCommand):
            await self._drain(command.timeout_s)
        return self.status()

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

    async def generate(self, command: GenerateCommand, prompt: npt.NDArray[np.int32], channel: Channel) -> None:
        """Serve one request to its end, whatever carries it.

        Args:
            command: What to do.
            prompt: `[num_tokens] int32`, kept.
            channel: Gets the answer.

        Raises:
            KelpError: To be sent as the request's end; nothing of it is held any more.
        """
        if self._state is not WorkerState.READY:
            refusal = WorkerStuck if self._state is WorkerState.STUCK else WorkerDraining
            raise refusal(f"worker {self._identity.worker_id} is {self._state.value}")
        stream = RequestStream(channel, self._parts.clock)
        if command.wants_receipt:
            stream.keep_alive()
            # The router has it before the engine has the request.
            await asyncio.sleep(0)
        # A retried request may come back while its first attempt still winds down: ids are per attempt.
        request_id = f"{command.request_id}#{uuid.uuid4().hex[:8]}"
        request = self._request(command, request_id, prompt, stream)
        self._streams[request_id] = stream
        try:
            with self._running.running(command.request_id) as cancel, channel.watching(cancel):
                finished = await self._run(command, request, stream)
        except asyncio.CancelledError:
            raise channel.failure or RequestCancelled("the client cancelled or went away") from None
        finally:
            del self._streams[request_id]
        if finished is not None:
            await stream.finish(finished)
        if channel.failure is not None:
            raise channel.failure

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
            tenant=bytes.fromhex(command.tenant_hex),
        )

    async def _run(self, command: GenerateCommand, request: ExecutorRequest, stream: RequestStream) -> Finished | None:
        """Run to the end; returns the last message, None if it has been sent."""
        if command.role is Role.DECODE:
            run = DecodeRun(self._parts.executor, self._parts.reader, command, self._quarantined)
            return await run.run(request, stream)
        if self._parts.tiers is None:
            return await self._run_whole(command, request, stream)
        tiers, known_blocks = self._parts.tiers, command.lower_tier_blocks
        async with tiers.onboarding(request, stream, known_blocks) as changed:
            return await self._run_whole(command, changed, stream)

    async def _run_whole(
        self, command: GenerateCommand, request: ExecutorRequest, stream: RequestStream
    ) -> Finished | None:
        """Run a request whose prompt is computed here."""
        executor = self._parts.executor
        if command.role is Role.PREFILL:
            return await run_prefill(executor, self._parts.handoffs, command, request, stream)
        stream.end_with_executor()
        executor.submit(request)
        try:
            await stream.wait_over()
        except BaseException:
            executor.abort(request.request_id)
            raise
        return None

    async def _drain(self, timeout_s: float) -> None:
        if self._state is not WorkerState.DRAINING:
            self._state = WorkerState.DRAINING
            self._tasks.append(asyncio.ensure_future(self._end_grace()))
        await self._presence.publish()
        deadline_s = self._parts.clock.monotonic_s() + timeout_s
        while self._streams or self._parts.handoffs.num_leases:
            if self._parts.clock.monotonic_s() >= deadline_s:
                return
            await asyncio.sleep(_DRAIN_POLL_S)

    async def _end_grace(self) -> None:
        await asyncio.sleep(self._config.drain.grace_s)
        self._running.give_up(WorkerDraining(f"worker {self._identity.worker_id} is draining, its grace_s is over"))

    async def _note_stuck(self) -> None:
        if self._watchdog.is_stuck:
            text = f"worker {self._identity.worker_id} {self._watchdog.why_stuck}"
            self._running.give_up(WorkerStuck(text))
            if self._state is WorkerState.READY:
                self._state = WorkerState.STUCK
        elif self._state is WorkerState.STUCK:
            self._state = WorkerState.READY
        await self._presence.publish()

    def _show_manager(self) -> None:
        showing = asyncio.ensure_future(self._presence.publish())
        self._showing.add(showing)
        showing.add_done_callback(self._showing.discard)

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
            direct_endpoint=self._direct_endpoint,
            handoff_endpoint=self._handoff_endpoint,
            handoff_shape=self._parts.executor.handoff_shape,
            layout=LayoutRecord.of(self._parts.executor.layout),
            events_endpoint="" if events is None else events.endpoint,
            replay_endpoint="" if events is None else events.replay_endpoint,
            kv_manager_id="" if self._parts.tiers is None else self._parts.tiers.manager_id,
            max_step_tokens=self._config.executor.max_step_tokens,
            max_running=self._config.executor.max_running,
            tags=self._config.server.tags,
            asks_token=self._parts.token is not None,
            version=self._config.model.version,
            text_id=self._identity.text_id,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
        )

    def _close_threads(self) -> None:
        self._parts.executor.close()
        if self._parts.events is not None:
            self._parts.events.close()
        if self._parts.tiers is not None:
            self._parts.tiers.close()
        self._parts.agent.close()
        self._cancel_watch.close()
        self._outbox.close()
