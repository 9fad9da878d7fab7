"""The router as a whole: one request from tensors to its last response."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Protocol

from kelp.client.base import WorkerOutput, WorkerStream
from kelp.core.cancel_watch import CancelWatch
from kelp.core.clock import Clock
from kelp.core.config import RouterConfig
from kelp.core.errors import CapacityError, DeadlineExceeded, KelpError, RequestCancelled, WorkerLost
from kelp.core.exchange import Exchange
from kelp.core.messages import SamplingParams
from kelp.core.metrics import REQUESTS, RETRIES, Metrics
from kelp.core.outbox import Lane, Outbox
from kelp.core.preprocess_messages import PreparedPrompt
from kelp.core.request import LlmRequest, parse_request
from kelp.core.request_limits import RequestLimits
from kelp.core.types import FinishReason
from kelp.router.attempt import Attempt, AttemptParts
from kelp.router.job import Job
from kelp.router.placement import Placement, Placer, WorkerKey, key_of
from kelp.router.relay import Detokenizer, End, NewTokens, Relay, RelayItem, RelayOptions, StopMatcher
from kelp.router.summary import observe, summary_tensors

_MAX_ATTEMPTS = 4


class Preprocess(Protocol):
    """Turns a request's prompt into tokens; `kelp_triton` asks the `preprocess` model."""

    async def prepare(self, request: LlmRequest) -> PreparedPrompt:
        """Tokenise and check the prompt.

        Raises:
            KelpError: The prompt cannot be served.
        """


class TextFactory(Protocol):
    """Makes the stateful text parts of one request."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a sequence."""

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental detokeniser."""

    def stop_matcher(self, words: tuple[str, ...]) -> StopMatcher:
        """A fresh matcher."""


@dataclass(frozen=True, slots=True)
class RouterParts:
    """What a router is made of; `build.py` puts it together."""

    preprocess: Preprocess
    text: TextFactory
    placer: Placer
    attempts: AttemptParts
    cancel_watch: CancelWatch
    outbox: Outbox[RelayItem]
    clock: Clock
    metrics: Metrics


class StreamCloser:
    """Cancels and drains streams that nobody reads any more, behind the requests' backs."""

    def __init__(self) -> None:
        self._closing: set[asyncio.Task[None]] = set()

    def retire(self, stream: WorkerStream) -> None:
        """Close in the background."""
        task = asyncio.ensure_future(stream.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def wait(self) -> None:
        """Wait until all are closed."""
        if self._closing:
            await asyncio.wait(self._closing)


class RouterService:
    """Handles requests; belongs to one event loop."""

    def __init__(self, parts: RouterParts, config: RouterConfig) -> None:
        self._parts = parts
        self._config = config
        self._limits = RequestLimits.from_config(config)

    async def handle(self, exchange: Exchange) -> None:
        """Serve one request to its end.

        Raises:
            KelpError: For the guard to send; nothing of the request is held any more.
        """
        try:
            await self._serve(exchange)
        except KelpError as error:
            self._parts.metrics.add(REQUESTS, outcome=error.code.lower())
            raise
        self._parts.metrics.add(REQUESTS, outcome="ok")

    async def _serve(self, exchange: Exchange) -> None:
        arrival_ns, arrival_s = self._parts.clock.wall_ns(), time.monotonic()
        request = parse_request(exchange.inputs(), self._limits, exchange.parameters())
        deadline_s = arrival_s + (
            self._config.default_deadline_s if request.deadline_ms is None else request.deadline_ms / 1e3
        )
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(self._run(request, exchange, deadline_s, arrival_ns))
        with self._parts.cancel_watch.watching(exchange, lambda: loop.call_soon_threadsafe(task.cancel)):
            done, _ = await asyncio.wait({task}, timeout=max(0.0, deadline_s - time.monotonic()))
        if not done:
            task.cancel()
            await asyncio.wait({task})
            raise DeadlineExceeded(f"deadline_ms: {(deadline_s - arrival_s) * 1e3:.0f} ms have passed")
        if task.cancelled():
            raise RequestCancelled("the client cancelled or went away")
        await task

    async def _run(self, request: LlmRequest, exchange: Exchange, deadline_s: float, arrival_ns: int) -> None:
        prompt = await self._parts.preprocess.prepare(request)
        sampling = request.sampling.model_copy(update={"bad_words_ids": prompt.message.bad_words_ids})
        job = Job(
            request_id=uuid.uuid4().hex, prompt=prompt, sampling=sampling, deadline_s=deadline_s, arrival_ns=arrival_ns
        )
        await Conversation(self._parts, self._config, job).run(self._relay(request, prompt, exchange))

    def _relay(self, request: LlmRequest, prompt: PreparedPrompt, exchange: Exchange) -> Relay:
        options = RelayOptions(
            is_streaming=request.stream,
            has_log_probs=request.output.return_log_probs,
            hidden_token_ids=self._hidden_ids(request.sampling),
            prefix="" if request.output.exclude_input_in_output else prompt.prompt_text,
        )
        text = self._parts.text
        return Relay(exchange, text.detokenizer(), text.stop_matcher(request.stop_words), options)

    def _hidden_ids(self, sampling: SamplingParams) -> frozenset[int]:
        own = frozenset(sampling.stop_token_ids)
        return own if sampling.ignore_eos else own | self._parts.text.eos_token_ids


class Conversation:
    """One job with its relay: attempts until the sequence has ended."""

    def __init__(self, parts: RouterParts, config: RouterConfig, job: Job) -> None:
        self._parts = parts
        self._config = config
        self._job = job
        self._failed: set[WorkerKey] = set()
        self._num_handoff_failures = 0
        self._stopped = asyncio.Event()
        self._sent_last = asyncio.Event()

    async def run(self, relay: Relay) -> None:
        """Run until the last response has gone out.

        Raises:
            KelpError: No worker could finish the request.
        """
        loop, clock = asyncio.get_running_loop(), self._parts.clock
        relay.on_first_token = lambda: setattr(self._job, "first_sent_ns", clock.wall_ns())
        relay.on_stop_word = lambda: loop.call_soon_threadsafe(self._stopped.set)
        relay.on_sent_last = lambda: loop.call_soon_threadsafe(self._sent_last.set)
        lane = self._parts.outbox.lane(relay.flush)
        reason = await self._generate_or_stop(lane)
        lane.put(End(reason, lambda num_tokens: summary_tensors(self._job, num_tokens)))
        await self._sent_last.wait()
        observe(self._parts.metrics, self._job, relay.num_responses, self._parts.clock.wall_ns())

    async def _generate_or_stop(self, lane: Lane[RelayItem]) -> FinishReason:
        generating = asyncio.ensure_future(self._generate(lane))
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({generating, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return await generating if generating.done() else FinishReason.STOP
        finally:
            generating.cancel()
            stopping.cancel()

    async def _generate(self, lane: Lane[RelayItem]) -> FinishReason:
        def relay(output: WorkerOutput) -> None:
            lane.put(NewTokens(output.token_ids, output.log_probs))

        for num_attempt in range(1, _MAX_ATTEMPTS + 1):
            placement = await self._place()
            self._job.worker_ids = placement.worker_ids
            attempt = Attempt(self._parts.attempts, self._job, placement, relay)
            try:
                with self._parts.placer.counting(placement):
                    finished = await attempt.run()
                return finished.finish_reason or FinishReason.ERROR
            except KelpError as error:
                self._note_failure(attempt, error)
                if num_attempt == _MAX_ATTEMPTS or not error.is_retryable:
                    raise
                ended = self._job.finish_reason(self._parts.text.eos_token_ids)
                if ended is not None:
                    return ended
        raise WorkerLost("no attempt was made")

    async def _place(self) -> Placement:
        routing, avoid = self._job.routing(), frozenset(self._failed)
        allow_prefill = self._num_handoff_failures <= self._config.max_prefill_retries
        try:
            return self._parts.placer.place(routing, avoid, allow_prefill)
        except CapacityError:
            await self._parts.placer.look_again()
            return self._parts.placer.place(routing, avoid, allow_prefill)

    def _note_failure(self, attempt: Attempt, error: KelpError) -> None:
        if error.is_retryable:
            self._parts.metrics.add(RETRIES, reason=error.code.lower())
        if attempt.failed_worker is not None and isinstance(error, (WorkerLost, CapacityError)):
            self._failed.add(key_of(attempt.failed_worker))
        if attempt.is_handoff_failure:
            self._num_handoff_failures += 1
