"""One request's way through a worker: events from the executor, responses to the router.

Tokens go from the executor's thread straight to the request's channel; only what needs a decision passes through the
event loop's queue, because waking a task costs as much as a step of the mock executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kelp.client.base import WorkerOutput
from kelp.core.clock import Clock
from kelp.core.messages import Finished, Progress, RequestTimings, RequestUsage
from kelp.core.types import FinishReason
from kelp.executor.base import Admitted, Completed, ExecutorEvent, Failed, Tokens
from kelp.worker.channel import Channel, Source, StreamItem


class RequestStream:
    """Carries one request's events; made on the event loop, `sink` is called from the executor's thread.

    Attributes:
        first: The first tokens that came; there if the request has completed with any.
    """

    def __init__(self, channel: Channel, clock: Clock) -> None:
        self._channel = channel
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[ExecutorEvent | None] = asyncio.Queue()
        self._sent_last = asyncio.Event()
        self._ends_with_executor = False
        self._has_sent_tokens = False
        self.first: Tokens | None = None
        self.usage = RequestUsage()
        # No message yet: copying those takes longer than all else that is done here per request.
        self._times_ns = {"arrival_ns": clock.wall_ns()}
        channel.open(Source(self._merge, self._note_sent_last))

    def sink(self, event: ExecutorEvent) -> None:
        """Take an event; called from the executor's thread, never blocks."""
        if isinstance(event, Admitted):
            # Here, not on the loop: the first token may overtake what waits there, and tells of this.
            self.usage = event.usage
            self.note_time(first_scheduled_ns=event.first_scheduled_ns)
        elif isinstance(event, Tokens):
            self.first = self.first or event
            self._channel.put(event)
        elif self._ends_with_executor and isinstance(event, Completed):
            self._channel.put(self.completed(event))
        else:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def keep_alive(self) -> None:
        """Send an empty response: the router sees that the worker lives while the request waits."""
        self._channel.put(Tokens((), ()))

    def end_with_executor(self) -> None:
        """The request is over when the executor says so: its end goes out with the last tokens, past the loop."""
        self._ends_with_executor = True

    async def wait_over(self) -> None:
        """After `end_with_executor`: returns when the last response has gone out.

        Raises:
            KelpError: The executor failed the request.
        """
        try:
            event = await self._events.get()
        except BaseException:
            self._ends_with_executor = False
            raise
        if isinstance(event, Failed):
            raise event.error

    async def events(self) -> AsyncIterator[ExecutorEvent]:
        """Events but tokens and admission, in order, until the executor has let go of the request.

        Raises:
            KelpError: The executor failed the request.
        """
        while True:
            event = await self._events.get()
            assert event is not None
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Completed):
                return

    def note_time(self, **times_ns: int) -> None:
        """Record when something happened."""
        self._times_ns = {**self._times_ns, **times_ns}

    def note_usage(self, **counts: int | tuple[int, ...]) -> None:
        """Record what something cost."""
        self.usage = self.usage.model_copy(update=counts)

    async def finish(self, finished: Finished) -> None:
        """Send the last response, after all tokens; returns when it has gone out."""
        self._channel.put(finished)
        await self._sent_last.wait()

    def completed(self, event: Completed) -> Finished:
        """The last message of a request that the executor ended, with this worker's own times and counts."""
        own = {name: time_ns for name, time_ns in self._times_ns.items() if time_ns}
        return Finished(
            finish_reason=event.finish_reason,
            usage=event.usage.model_copy(
                update={
                    "transferred_blocks": self.usage.transferred_blocks,
                    "onboarded_tiers": self.usage.onboarded_tiers,
                }
            ),
            timings=event.timings.model_copy(update=own),
        )

    def _merge(self, items: list[StreamItem]) -> WorkerOutput:
        if len(items) == 1 and isinstance(items[0], Tokens):
            ids, log_probs, finished = items[0].token_ids, items[0].log_probs, None
        else:
            tokens = [item for item in items if isinstance(item, Tokens)]
            finished = next((item for item in items if isinstance(item, Finished)), None)
            ids = tuple([token for item in tokens for token in item.token_ids])
            log_probs = tuple([log_prob for item in tokens for log_prob in item.log_probs])
        event = finished or (self._progress() if ids and not self._has_sent_tokens else None)
        self._has_sent_tokens = self._has_sent_tokens or bool(ids)
        return WorkerOutput(ids, log_probs, event)

    def _note_sent_last(self) -> None:
        self._sent_last.set()
        if self._ends_with_executor:
            self._events.put_nowait(None)

    def _progress(self) -> Progress:
        times_ns = {"first_token_ns": self._clock.wall_ns(), **self._times_ns}
        return Progress(usage=self.usage, timings=RequestTimings.model_validate(times_ns))


def is_over(event: Completed) -> bool:
    """Whether a prefill's sequence has ended, so that nobody decodes it."""
    return event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED)
