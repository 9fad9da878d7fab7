"""An attempt on workers that a test plays, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from router_rig import FakeWorkers, attempt_parts, job, on_paper, prefill_record, record

from kelp.core.messages import Finished
from kelp.core.types import HandoffShape
from kelp.registry.base import WorkerRecord
from kelp.router.attempt import Attempt
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.selector import Decision
from kelp.router.job import Job
from kelp.router.service import StreamCloser
from support.virtual_time import run_in_virtual_time

DECODE = record("decode")
PREFILL = prefill_record()
TICKET_PREFILL = prefill_record(handoff_shape=HandoffShape.TICKET)


class Trial:
    """An attempt with its workers; everything relayed is in `tokens`."""

    def __init__(self, prefill: WorkerRecord | None, request: Job, **patience: float) -> None:
        self.workers = FakeWorkers(*filter(None, (prefill, DECODE)))
        self.tokens: list[int] = []
        self.request = request
        self.closer = StreamCloser()
        parts = attempt_parts(self.workers, self.closer, **patience)
        self.placement = on_paper(Decision(RoutingRequest(4, ()), DECODE, prefill))
        self.attempt = Attempt(parts, request, self.placement, lambda output: self.tokens.extend(output.token_ids))

    async def settle(self) -> None:
        """Let everybody react; takes virtual time, far less than a liveness check."""
        await asyncio.sleep(0.01)

    async def closed(self) -> list[bool]:
        await self.closer.wait()
        return [stream.is_closed for stream in self.workers.streams]


Story = Callable[[Trial, "asyncio.Task[Finished]"], Awaitable[None]]


def play(
    story: Story,
    prefill: WorkerRecord | None = None,
    request: Job | None = None,
    **patience: float,
) -> None:
    """Tell `story` beside a running attempt, in virtual time."""

    async def scene() -> None:
        trial = Trial(prefill, request or job(), **patience)
        running = asyncio.ensure_future(trial.attempt.run())
        await trial.settle()
        await story(trial, running)
        await asyncio.gather(running, return_exceptions=True)
        assert all(await trial.closed()), "a stream was left open"

    run_in_virtual_time(scene())
