"""Asks an engine for one token of its own: requests that fail one after the other may be bad, or the engine is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time

import numpy as np

from kelp.core.errors import EngineFailed, KelpError
from kelp.core.messages import SamplingParams
from kelp.core.types import Role, SequenceHash
from kelp.executor.base import Completed, Executor, ExecutorEvent, ExecutorRequest, Failed

_HASH_BYTES = 16
_numbers = itertools.count()


class SelfTest:
    """Of one engine; belongs to one event loop."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def has_failed(self, timeout_s: float) -> bool:
        """Whether the engine failed at it; one that is too full, or too slow to say so in time, has not."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[ExecutorEvent] = loop.create_future()

        def sink(event: ExecutorEvent) -> None:
            if isinstance(event, Completed | Failed):
                # The loop is closed where the engine is taken down after its worker.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(ended.set_result, event)

        request = ExecutorRequest(
            request_id=f"self-test-{next(_numbers)}",
            prompt=np.zeros(1, dtype=np.int32),
            role=Role.AGGREGATED,
            sampling=SamplingParams(max_tokens=1),
            seed_hash=SequenceHash(secrets.token_bytes(_HASH_BYTES)),
            sink=sink,
            deadline_s=time.monotonic() + timeout_s,
        )
        try:
            self._executor.submit(request)
        except KelpError:
            return False
        await asyncio.wait([ended], timeout=timeout_s)
        if not ended.done():
            self._executor.abort(request.request_id)
            return False
        event = ended.result()
        return isinstance(event, Failed) and isinstance(event.error, EngineFailed)
