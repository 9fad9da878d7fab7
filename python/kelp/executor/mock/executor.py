"""The batching executor over a `MockRunner`, plus what a handoff means for it: a delay, and a check of every block."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from kelp.core.clock import Clock
from kelp.core.errors import InternalError
from kelp.core.types import Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, Failed, Reserved, Sink
from kelp.executor.batching.executor import BatchingExecutor, BatchingExecutorParts
from kelp.executor.mock.memory import KVMemory
from kelp.timing.model import TimingModel


class Delays:
    """Runs actions later, in order of their times, from one thread that sleeps in between."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kelp-mock-transfers", daemon=True)
        self._thread.start()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` in `seconds`; it must not block."""
        with self._changed:
            heapq.heappush(self._due, (self._clock.monotonic_s() + seconds, next(self._numbers), action))
            self._changed.notify()

    def close(self) -> None:
        """Stop; what has not run yet never will."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._is_closed:
                wait_s = self._due[0][0] - self._clock.monotonic_s() if self._due else None
                if wait_s is None or wait_s > 0:
                    self._changed.wait(wait_s)
                else:
                    heapq.heappop(self._due)[2]()


@dataclass(frozen=True, slots=True)
class _Import:
    request: ExecutorRequest
    reserved: Reserved

    def of_first(self, num_blocks: int) -> _Import:
        """The part of an onboarding that came, and what was cached before."""
        num_blocks = max(num_blocks, self.reserved.num_cached_blocks)
        return _Import(self.request, replace(self.reserved, block_ids=self.reserved.block_ids[:num_blocks]))


class MockExecutor(BatchingExecutor):
    """See `executor.base.Executor`.

    Args:
        memory: The pool that `parts` describe.
        timing: What transfers take; None for no time.
    """

    def __init__(
        self, parts: BatchingExecutorParts, memory: KVMemory, timing: TimingModel | None, clock: Clock
    ) -> None:
        self._kv = memory
        self._timing = timing
        self._delays = None if timing is None else Delays(clock)
        self._imports: dict[str, _Import] = {}
        super().__init__(parts, clock)

    def submit(self, request: ExecutorRequest) -> None:
        """See `Executor`."""
        if request.role is Role.DECODE or request.onboard_blocks:
            request = replace(request, sink=self._noting_blocks(request))
        super().submit(request)

    def complete_import(
        self, request_id: str, first_token: int, first_log_prob: float, num_transferred_blocks: int
    ) -> None:
        """See `Executor`; blocks that hold anything but the prompt's KV fail the request with InternalError."""

        def go_on() -> None:
            BatchingExecutor.complete_import(self, request_id, first_token, first_log_prob, num_transferred_blocks)

        awaited = self._imports.pop(request_id, None)
        if awaited is not None and (error := self._what_is_wrong(awaited)) is not None:
            self.reject_import(request_id, error)
        elif self._delays is None or self._timing is None or not num_transferred_blocks:
            go_on()
        else:
            self._delays.after(self._timing.handoff_s(num_transferred_blocks), go_on)

    def complete_onboard(self, request_id: str, num_blocks: int) -> None:
        """See `TieredExecutor`; blocks that hold anything but the prompt's KV fail the request with InternalError."""
        awaited = self._imports.pop(request_id, None)
        if awaited is not None and (error := self._what_is_wrong(awaited.of_first(num_blocks))) is not None:
            self.reject_import(request_id, error)
        else:
            super().complete_onboard(request_id, num_blocks)

    def close(self) -> None:
        """See `Executor`."""
        if self._delays is not None:
            self._delays.close()
        super().close()

    def _noting_blocks(self, request: ExecutorRequest) -> Sink:
        def sink(event: ExecutorEvent) -> None:
            if isinstance(event, Reserved):
                self._imports[request.request_id] = _Import(request, event)
            elif isinstance(event, Completed | Failed):
                self._imports.pop(request.request_id, None)
            request.sink(event)

        return sink

    def _what_is_wrong(self, awaited: _Import) -> InternalError | None:
        request, reserved = awaited.request, awaited.reserved
        num_tokens = len(reserved.block_ids) * self.layout.block_size
        index = self._kv.find_wrong_block(reserved.block_ids, request.prompt[:num_tokens])
        if index is None:
            return None
        origin = "the prefix cache" if index < reserved.num_cached_blocks else "the peer"
        return InternalError(
            f"{request.request_id}: block {index} of {len(reserved.block_ids)}, which came from {origin}, "
            f"does not hold the prompt's KV (pool block {reserved.block_ids[index]})"
        )
