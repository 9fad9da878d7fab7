"""All sequences of one request with their relay.

Sequence 0 is placed like any request. The others start when its first token shows that the prompt has been computed,
on the worker that decodes it, whose prefix cache then has the prompt's full blocks. Each goes its own way from there:
a failure that another attempt can mend concerns one sequence, any other one the whole request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from kelp.client.base import WorkerOutput
from kelp.core.errors import InternalError
from kelp.core.messages import Finished
from kelp.core.outbox import Lane, Outbox
from kelp.router.job import Job
from kelp.router.placement import Placement
from kelp.router.relay import End, NewTokens, Relay, RelayItem
from kelp.router.sequence import SequenceParts, SequenceRun
from kelp.router.summary import observe, summary_tensors


class Conversation:
    """One request under way; made and run on the event loop.

    Args:
        jobs: One per sequence, in their order.
        relay: Made for as many sequences.
    """

    def __init__(self, parts: SequenceParts, outbox: Outbox[RelayItem], jobs: Sequence[Job], relay: Relay) -> None:
        self._metrics = parts.metrics
        self._clock = parts.attempts.clock
        self._jobs = jobs
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._has_spoken = False
        self._lane: Lane[RelayItem] = outbox.lane(relay.flush, self._note_failure)
        self._runs = [SequenceRun(parts, job, partial(self._pass_on, index)) for index, job in enumerate(jobs)]
        self._has_prompt = asyncio.Event()
        self._sent_last = asyncio.Event()

    async def run(self) -> None:
        """Run until the last response has gone out.

        Raises:
            KelpError: No worker could finish one of the sequences, or a response could not be sent; all have been
                given up.
        """
        self._task = asyncio.current_task()
        try:
            await self._run()
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            raise InternalError(f"a response could not be sent: {self._failure}") from self._failure
        finally:
            self._task = None

    async def _run(self) -> None:
        loop, relay, first = self._loop, self._relay, self._jobs[0]
        relay.on_first_token = lambda: setattr(first, "first_sent_ns", self._clock.wall_ns())
        relay.on_stop_word = lambda index: loop.call_soon_threadsafe(self._runs[index].stop)
        relay.on_sent_last = lambda: loop.call_soon_threadsafe(self._sent_last.set)
        relay.summary = lambda num_tokens: summary_tensors(self._jobs, num_tokens)
        if len(self._jobs) == 1:
            await self._sequence(0)
        else:
            await self._all_sequences()
        await self._sent_last.wait()
        observe(self._metrics, self._jobs, relay.num_responses, self._clock.wall_ns())

    def _note_failure(self, error: Exception) -> None:
        """Called in the thread that sends."""
        self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: Exception) -> None:
        if self._task is not None and self._failure is None:
            self._failure = error
            self._task.cancel()

    async def _all_sequences(self) -> None:
        sequences = [asyncio.ensure_future(self._sequence(index)) for index in range(len(self._jobs))]
        try:
            await asyncio.gather(*sequences)
        finally:
            for sequence in sequences:
                sequence.cancel()
            await asyncio.wait(sequences)

    async def _sequence(self, index: int) -> None:
        reason = await self._runs[index].run(await self._beside_the_first() if index else None)
        self._lane.put(End(reason, index))
        self._has_prompt.set()

    async def _beside_the_first(self) -> Placement | None:
        await self._has_prompt.wait()
        return self._runs[0].placement

    def _pass_on(self, index: int, output: WorkerOutput) -> None:
        self._way_out(output)(NewTokens(output.token_ids, output.log_probs, index))
        # A first token of remote prefill is too early: siblings would compute what is still on its way.
        if self._runs[index].has_decoded:
            self._has_prompt.set()

    def _way_out(self, output: WorkerOutput) -> Callable[[NewTokens], None]:
        is_first, self._has_spoken = not self._has_spoken, True
        if isinstance(output.event, Finished) and output.event.finish_reason is not None:
            # The end of the sequence is next, and can share the response.
            return self._lane.add
        # The client waits for the first token, and for nothing as much.
        return self._lane.send if is_first and self._relay.is_streaming else self._lane.put
