"""A batching engine behind `executor.base.Executor`: one thread, one inbox.

Public methods validate what they can at once and put a command into the inbox; the thread drains it between
steps. Knows threads and queues, not models: the engine is handed in.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kelp.core.clock import Clock
from kelp.core.errors import CapacityError, EngineFailed, InvalidRequest, KelpError, WorkerLost
from kelp.core.kv_events import KVEventSink
from kelp.core.messages import RequestTimings, RequestUsage
from kelp.core.threads import show_thread_name
from kelp.core.types import BlockId, FinishReason, HandoffShape, KVLayout, SequenceHash
from kelp.executor.base import (
    Admitted,
    Completed,
    EvictionWatch,
    ExecutorEvent,
    ExecutorLimits,
    ExecutorLoad,
    ExecutorRequest,
    Failed,
    PoolMemory,
    Prefilled,
    SealedBlock,
    SealWatch,
    Sink,
    Tokens,
)
from kelp.executor.batching.batch import ModelRunner
from kelp.executor.batching.drafts import DraftProposer, NgramProposer
from kelp.executor.batching.engine import Engine, EngineRules
from kelp.executor.batching.guide import Guide
from kelp.executor.batching.guided import start_guide
from kelp.executor.batching.requests import check_request
from kelp.kv.pool import BlockPool
from kelp.text.grammar import GrammarCompiler

ENGINE_THREAD = "kelp-executor"
"""Name of the thread that an engine's steps run on, for the system too."""
_log = logging.getLogger(__name__)
_Command = Callable[[Engine], None]


@dataclass(frozen=True, slots=True)
class BatchingExecutorParts:
    """What an executor is assembled from (`torch.load.load_parts`, `mock.load.load_mock_parts`).

    Attributes:
        grammars: Compiles guides; None refuses them.
        proposer: Where drafts come from.
    """

    runner: ModelRunner
    layout: KVLayout
    limits: ExecutorLimits
    memory: PoolMemory
    rules: EngineRules
    max_waiting: int
    grammars: GrammarCompiler | None = None
    proposer: DraftProposer = NgramProposer()


class BatchingExecutor:
    """See `executor.base.TieredExecutor`. Starts its thread at once."""

    def __init__(self, parts: BatchingExecutorParts, clock: Clock) -> None:
        self._layout = parts.layout
        self._limits = parts.limits
        self._memory = parts.memory
        self._max_waiting = parts.max_waiting
        self._grammars = parts.grammars
        self._clock = clock
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ids: set[str] = set()
        self._num_submitting = 0
        self._is_closed = False
        self._step_began_s: float | None = None
        self._num_failed_steps = 0
        self._pool = BlockPool(parts.layout.num_blocks)
        self._engine = Engine(parts.runner, self._pool, parts.rules, clock, self._forget, parts.proposer)
        self._thread = threading.Thread(target=self._run, name=ENGINE_THREAD, daemon=True)
        self._thread.start()

    @property
    def layout(self) -> KVLayout:
        """See `Executor`."""
        return self._layout

    @property
    def limits(self) -> ExecutorLimits:
        """See `Executor`."""
        return self._limits

    @property
    def handoff_shape(self) -> HandoffShape:
        """See `Executor`."""
        return HandoffShape.RENDEZVOUS

    @property
    def pool_memory(self) -> PoolMemory:
        """See `Executor`."""
        return self._memory

    def watch_kv(self, sink: KVEventSink) -> None:
        """See `Executor`."""
        self._inbox.put(lambda _: self._pool.watch(sink))

    def submit(self, request: ExecutorRequest) -> None:
        """See `Executor`.

        Raises:
            WorkerLost: The executor is closed.
        """
        check_request(request, self._limits, self._layout)
        guide = start_guide(self._grammars, request)
        request_id = request.request_id
        arrival_ns = self._clock.wall_ns()
        guarded = replace(request, sink=self._guard(request_id, request.sink))
        with self._lock:
            if self._is_closed:
                raise WorkerLost("the executor is closed")
            if request_id in self._ids:
                raise InvalidRequest(f"request_id: {request_id!r} is in use")
            num_waiting = self._engine.num_waiting + self._num_submitting
            if num_waiting >= self._max_waiting:
                raise CapacityError(f"{num_waiting} requests wait, executor.max_waiting is {self._max_waiting}")
            if guide is not None and guide.is_finished:
                self._inbox.put(lambda _: self._end_at_once(guarded.sink, arrival_ns))
                return
            self._ids.add(request_id)
            self._num_submitting += 1
            self._inbox.put(lambda engine: self._admit(engine, guarded, arrival_ns, guide))

    def abort(self, request_id: str) -> None:
        """See `Executor`."""
        self._inbox.put(lambda engine: engine.abort(request_id))

    def complete_import(
        self, request_id: str, first_token: int, first_log_prob: float, num_transferred_blocks: int
    ) -> None:
        """See `Executor`; a first token outside the vocabulary fails the request with ProtocolError."""
        self._inbox.put(
            lambda engine: engine.complete_import(request_id, first_token, first_log_prob, num_transferred_blocks)
        )

    def reject_import(self, request_id: str, error: KelpError) -> None:
        """For engines that look at what came: it is wrong, so the request fails with `error`."""
        self._inbox.put(lambda engine: engine.reject_import(request_id, error))

    def fail_import(self, request_id: str) -> None:
        """See `Executor`."""
        self._inbox.put(lambda engine: engine.fail_import(request_id))

    def end_import(self, request_id: str) -> None:
        """See `Executor`."""
        self._inbox.put(lambda engine: engine.end_import(request_id))

    def release_export(self, request_id: str) -> None:
        """See `Executor`."""
        self._inbox.put(lambda engine: engine.release_export(request_id))

    def watch_seals(self, watch: SealWatch, watermark: float | None, on_evicted: EvictionWatch | None = None) -> None:
        """See `TieredExecutor`."""

        def guarded(blocks: Sequence[SealedBlock]) -> int:
            try:
                return watch(blocks)
            except Exception:
                _log.exception("the watch on sealed blocks failed; it keeps none of %d", len(blocks))
                return 0

        self._inbox.put(lambda engine: engine.offers.watch(guarded, watermark, on_evicted))

    def release_kept(self, block_ids: Sequence[BlockId]) -> None:
        """See `TieredExecutor`."""
        self._inbox.put(lambda engine: engine.offers.release(block_ids))

    def complete_onboard(self, request_id: str, num_blocks: int) -> None:
        """See `TieredExecutor`."""
        self._inbox.put(lambda engine: engine.complete_onboard(request_id, num_blocks))

    def count_cached(self, hashes: Sequence[SequenceHash]) -> int:
        """See `TieredExecutor`."""
        return self._pool.count_known(hashes)

    def load(self) -> ExecutorLoad:
        """See `Executor`; requests still in the inbox count as waiting."""
        with self._lock:
            load = self._engine.load()
            return replace(
                load,
                num_waiting=load.num_waiting + self._num_submitting,
                step_s=self._step_s(),
                num_failed_steps=self._num_failed_steps,
            )

    def close(self) -> None:
        """See `Executor`; idempotent."""
        with self._lock:
            self._is_closed = True
            self._inbox.put(None)
        self._thread.join()

    def _step_s(self) -> float:
        began_s = self._step_began_s
        return 0.0 if began_s is None else self._clock.monotonic_s() - began_s

    def _admit(self, engine: Engine, request: ExecutorRequest, arrival_ns: int, guide: Guide | None) -> None:
        with self._lock:
            self._num_submitting -= 1
            engine.add(request, arrival_ns, guide)

    def _end_at_once(self, sink: Sink, arrival_ns: int) -> None:
        """For a resumed request whose earlier output is all that its guide allows."""
        now_ns = self._clock.wall_ns()
        timings = RequestTimings(arrival_ns=arrival_ns, first_scheduled_ns=now_ns)
        sink(Admitted(RequestUsage(), now_ns))
        sink(Completed(FinishReason.STOP, RequestUsage(), timings))

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._ids.discard(request_id)

    def _guard(self, request_id: str, sink: Sink) -> Sink:
        """A sink of the worker's must not take the engine's thread down."""

        def guarded(event: ExecutorEvent) -> None:
            if self._num_failed_steps and isinstance(event, Tokens | Prefilled):
                self._num_failed_steps = 0
            try:
                sink(event)
            except Exception:
                _log.exception("sink of %s failed; aborting the request", request_id)
                if not isinstance(event, Completed | Failed):
                    self.abort(request_id)

        return guarded

    def _run(self) -> None:
        show_thread_name()
        try:
            self._serve()
            self._engine.fail_all(WorkerLost("the executor is closing"))
            self._engine.land_all()
        except BaseException:
            self._step_began_s = -math.inf
            raise
        finally:
            with self._lock:
                self._is_closed = True

    def _serve(self) -> None:
        is_idle = True
        while True:
            try:
                if not self._drain(is_idle):
                    return
                self._step_began_s = self._clock.monotonic_s()
                is_idle = not self._engine.step()
                self._step_began_s = None
            except Exception as error:
                _log.exception("engine step failed; giving all its requests up")
                self._num_failed_steps += 1
                self._engine.fail_all(EngineFailed(f"engine step failed: {error!r}"))
                self._step_began_s = None

    def _drain(self, is_idle: bool) -> bool:
        """Execute queued commands, first waiting for one if idle; False once closed."""
        wait_s = self._engine.seconds_to_wake() if is_idle else 0.0
        try:
            while True:
                if wait_s == 0.0 and self._inbox.empty():
                    return True
                command = self._inbox.get(timeout=wait_s)
                if command is None:
                    return False
                command(self._engine)
                wait_s = 0.0
        except queue.Empty:
            return True
