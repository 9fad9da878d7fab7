"""The router as a whole: one request from tensors to its last response."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kelp.client.base import WorkerStream
from kelp.core.cancel_watch import CancelWatch
from kelp.core.clock import Clock
from kelp.core.config import RouterConfig
from kelp.core.errors import CapacityError, DeadlineExceeded, KelpError, NotFound, RequestCancelled
from kelp.core.exchange import Exchange
from kelp.core.hashing import tenant_digest
from kelp.core.messages import SamplingParams
from kelp.core.metrics import REQUESTS, Metrics
from kelp.core.outbox import Outbox
from kelp.core.preprocess_messages import Prepared, PreparedPrompt
from kelp.core.request import LlmRequest, parse_request
from kelp.core.request_limits import RequestLimits, short_repr
from kelp.core.request_routing import EXPLAIN, read_explained_id
from kelp.router.attempt import AttemptParts
from kelp.router.conversation import Conversation
from kelp.router.decision.request import RoutingRequest
from kelp.router.job import Job
from kelp.router.patience import Absence
from kelp.router.placement import Placer
from kelp.router.queue import RETRY_AFTER, advice
from kelp.router.relay import Relay, RelayItem, RelayOptions
from kelp.router.request_ids import RequestIds
from kelp.router.sequence import SequenceParts
from kelp.router.sequence_text import Detokenizer, SequenceText, StopMatcher
from kelp.router.suspects import Suspects
from kelp.router.versions import Versions

Explain = Callable[[str], Awaitable[bytes | None]]


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
    """What a router is made of; `build.py` puts it together.

    Attributes:
        explain: Finds a decision, as JSON, by its request's id; None if it is known nowhere.
    """

    preprocess: Preprocess
    text: TextFactory
    placer: Placer
    versions: Versions
    attempts: AttemptParts
    cancel_watch: CancelWatch
    outbox: Outbox[RelayItem]
    clock: Clock
    metrics: Metrics
    explain: Explain


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


class _Ending:
    """Ends the request of the task that makes it, before its time: at the deadline, or when its client goes.

    Attributes:
        reason: Why the task is being cancelled; None: not from here.
    """

    def __init__(self, deadline_s: float, deadline_ms: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._deadline_ms = deadline_ms
        self._timer = self._loop.call_later(max(0.0, deadline_s - time.monotonic()), self._deadline_has_passed)
        self._is_over = False
        self.reason: KelpError | None = None

    def client_has_gone(self) -> None:
        """Thread-safe."""
        self._loop.call_soon_threadsafe(self._cancel, RequestCancelled("the client cancelled or went away"))

    def forget(self) -> None:
        """The request has ended."""
        self._is_over = True
        self._timer.cancel()

    def _deadline_has_passed(self) -> None:
        self._cancel(DeadlineExceeded(f"deadline_ms: {self._deadline_ms:.0f} ms have passed"))

    def _cancel(self, reason: KelpError) -> None:
        if not self._is_over and self.reason is None and self._task is not None:
            self.reason = reason
            self._task.cancel()


class RouterService:
    """Handles requests; belongs to one event loop."""

    def __init__(self, parts: RouterParts, config: RouterConfig) -> None:
        self._parts = parts
        self._config = config
        self._limits = RequestLimits.from_config(config)
        self._ids = RequestIds()
        self._sequences = SequenceParts(
            placer=parts.placer,
            attempts=parts.attempts,
            metrics=parts.metrics,
            eos_token_ids=parts.text.eos_token_ids,
            max_prefill_retries=config.max_prefill_retries,
            max_migrations=config.max_migrations,
            recovery_wait_s=config.recovery_wait_s,
            absence=Absence(config.absence_wait_s),
            suspects=Suspects(parts.attempts.view, config.suspect_wait_s),
        )

    async def handle(self, exchange: Exchange) -> None:
        """Serve one request to its end.

        Raises:
            KelpError: For the guard to send; nothing of the request is held any more.
        """
        try:
            await self._serve(exchange)
        except KelpError as error:
            self._parts.metrics.add(REQUESTS, outcome=error.code.lower())
            raise _advised(error) from None
        self._parts.metrics.add(REQUESTS, outcome="ok")

    async def _serve(self, exchange: Exchange) -> None:
        arrival_ns, arrival_s = self._parts.clock.wall_ns(), time.monotonic()
        parameters = exchange.parameters()
        explained_id = read_explained_id(parameters, self._limits)
        if explained_id is not None:
            await self._explain(explained_id, exchange)
            return
        request = parse_request(exchange.inputs(), self._limits, parameters)
        deadline_s = arrival_s + (
            self._config.default_deadline_s if request.deadline_ms is None else request.deadline_ms / 1e3
        )
        ending = _Ending(deadline_s, (deadline_s - arrival_s) * 1e3)
        try:
            with self._parts.cancel_watch.watching(exchange, ending.client_has_gone):
                await self._run(request, exchange, deadline_s, arrival_ns)
        except asyncio.CancelledError:
            if ending.reason is None:
                raise
            raise ending.reason from None
        finally:
            ending.forget()

    async def _explain(self, request_id: str, exchange: Exchange) -> None:
        document = await self._parts.explain(request_id)
        if document is None:
            raise NotFound(f"{EXPLAIN}: no router knows a decision about {short_repr(request_id)} (any more)")
        exchange.send({"text_output": np.array([document], dtype=np.object_)}, is_final=True)

    async def _run(self, request: LlmRequest, exchange: Exchange, deadline_s: float, arrival_ns: int) -> None:
        request_id = secrets.token_hex(16)
        prompt = await self._parts.preprocess.prepare(request)
        prompt = self._parts.versions.choose(prompt, request, request_id)
        first = Job(
            request_id=request_id,
            prompt=prompt,
            sampling=_sampling(request.sampling, prompt.message),
            deadline_s=deadline_s,
            arrival_ns=arrival_ns,
            lora_name=request.lora_name,
            tenant_hex=tenant_digest(request.cache_salt).hex() if request.cache_salt else "",
        )
        relay = self._relay(request, prompt, exchange)
        with self._ids.named(exchange.request_id()) as name:
            first.routing = _routing(request, name)
            jobs = [first, *(first.sibling(index) for index in range(1, request.num_sequences))]
            await Conversation(self._sequences, self._parts.outbox, jobs, relay).run()

    def _relay(self, request: LlmRequest, prompt: PreparedPrompt, exchange: Exchange) -> Relay:
        text, hidden_token_ids = self._parts.text, self._hidden_ids(request.sampling)
        prefix = "" if request.output.exclude_input_in_output else prompt.prompt_text
        sequences = [
            SequenceText(text.detokenizer(), text.stop_matcher(request.stop_words), hidden_token_ids, prefix)
            for _ in range(request.num_sequences)
        ]
        options = RelayOptions(request.stream, request.output.return_log_probs, len(prompt.input_ids))
        return Relay(exchange, sequences, options)

    def _hidden_ids(self, sampling: SamplingParams) -> frozenset[int]:
        own = frozenset(sampling.stop_token_ids)
        return own if sampling.ignore_eos else own | self._parts.text.eos_token_ids


def _advised(error: KelpError) -> KelpError:
    """Whoever is shed hears when to come again, also where no queue had to do with it."""
    if not isinstance(error, CapacityError) or RETRY_AFTER in error.text:
        return error
    return type(error)(f"{error.text}; {advice(0.0)}")


def _sampling(asked: SamplingParams, prepared: Prepared) -> SamplingParams:
    if not prepared.bad_words_ids:
        return asked
    return asked.model_copy(update={"bad_words_ids": prepared.bad_words_ids})


def _routing(request: LlmRequest, name: str) -> RoutingRequest:
    """All but the prompt, which the job adds."""
    return RoutingRequest(
        num_prompt_tokens=0,
        block_hashes=(),
        request_id=name,
        session_id=request.session_id,
        priority=request.priority,
        pinned_worker=request.wishes.worker,
        required_tags=request.wishes.required_tags,
        preferred_tags=request.wishes.preferred_tags,
    )
