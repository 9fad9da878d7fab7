"""A router among workers that say what a test tells them to say."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kelp.client.base import Receive, WorkerAddress, WorkerOutput
from kelp.core.cancel_watch import CancelWatch
from kelp.core.clock import Clock, FakeClock, SystemClock
from kelp.core.config import RouterConfig, RoutingConfig
from kelp.core.config_replicas import QueueConfig
from kelp.core.errors import KelpError
from kelp.core.messages import (
    DrainCommand,
    Finished,
    GenerateCommand,
    Progress,
    Rendezvous,
    SamplingParams,
    WorkerStatus,
)
from kelp.core.metrics import Metrics
from kelp.core.outbox import Outbox
from kelp.core.preprocess_messages import Prepared, PreparedPrompt
from kelp.core.request import LlmRequest
from kelp.core.types import FinishReason, Role, WorkerState
from kelp.core.wire import encode_message
from kelp.registry.base import LayoutRecord, TrafficRecord, WorkerRecord
from kelp.router.admission import Admission
from kelp.router.attempt import AttemptParts
from kelp.router.capacity import Capacity
from kelp.router.decision.selector import Decision, Selector, SelectorMode
from kelp.router.decision.workers import WorkerTable
from kelp.router.index.kv_index import KVIndex
from kelp.router.job import Job
from kelp.router.ledger import Ledger
from kelp.router.patience import Patience
from kelp.router.placement import Placement, Placer
from kelp.router.relay import RelayItem
from kelp.router.replicas.loads import OwnLoads
from kelp.router.request_ids import meant_by, shown
from kelp.router.service import RouterParts, RouterService, StreamCloser
from kelp.router.versions import Versions
from kelp.text.stop_words import StopWords
from support.exchange import FakeExchange, bytes_tensor
from support.waiting import until

EOS = 0
LAYOUT = LayoutRecord(
    num_blocks=64, num_layers=1, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", model_id="m"
)


def record(name: str, role: Role = Role.DECODE, **changes: object) -> WorkerRecord:
    """A ready worker; prefill workers have a handoff endpoint of their own."""
    fields: dict[str, object] = {
        "worker_id": f"host:1/{name}",
        "epoch": f"epoch of {name}",
        "model_name": name,
        "role": role,
        "state": WorkerState.READY,
        "endpoint": "host:1",
        "handoff_endpoint": f"{name}:2",
        "layout": LAYOUT,
    }
    return WorkerRecord.model_validate({**fields, **changes})


def prefill_record(name: str = "prefill", **changes: object) -> WorkerRecord:
    return record(name, Role.PREFILL, **changes)


class FakeStream:
    """One request on one worker; the test is the worker, and what it says is heard in the loop's next round."""

    def __init__(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive
    ) -> None:
        self.address = address
        self.command = command
        self.prompt = [int(token) for token in prompt]
        self.num_closes = 0
        self.num_unheard = 0
        self._receive = receive
        self._has_ended = False

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    @property
    def is_closed(self) -> bool:
        """Whether the router has nothing to do here any more."""
        return self.num_closes > 0 or self._has_ended

    @property
    def is_read(self) -> bool:
        """Whether everything said has been taken by the router."""
        return self.num_unheard == 0

    def say(self, *token_ids: int, event: Progress | Finished | None = None) -> None:
        """Send tokens; none is a keep-alive. The log-prob of token *t* is -t."""
        self._tell(WorkerOutput(token_ids, tuple(-float(token) for token in token_ids), event))

    def finish(self, reason: FinishReason | None, *token_ids: int, ticket: Rendezvous | None = None) -> None:
        self.say(*token_ids, event=Finished(finish_reason=reason, rendezvous=ticket))
        self.end()

    def fail(self, error: KelpError) -> None:
        self._tell(error)

    def end(self) -> None:
        """End the stream."""
        self._tell(None)

    async def close(self) -> None:
        self.num_closes += 1

    def _tell(self, item: WorkerOutput | KelpError | None) -> None:
        self.num_unheard += 1
        asyncio.get_running_loop().call_soon(self._hear, item)

    def _hear(self, item: WorkerOutput | KelpError | None) -> None:
        self.num_unheard -= 1
        self._has_ended = self._has_ended or not isinstance(item, WorkerOutput)
        self._receive(item)


class FakeWorkers:
    """`WorkerClient` and `WorkersView` of workers that exist on paper."""

    def __init__(self, *records: WorkerRecord) -> None:
        self.known = list(records)
        self.dead: set[str] = set()
        self.gone: set[str] = set()
        self.arriving: list[WorkerRecord] = []
        self.streams: list[FakeStream] = []
        self.num_refreshes = 0
        self.traffic: list[TrafficRecord] = []

    def generate(
        self, address: WorkerAddress, command: GenerateCommand, prompt: npt.NDArray[np.int32], receive: Receive
    ) -> FakeStream:
        stream = FakeStream(address, command, prompt, receive)
        self.streams.append(stream)
        return stream

    async def control(self, address: WorkerAddress, command: DrainCommand | None) -> WorkerStatus:
        raise NotImplementedError

    def expect(self, addresses: Iterable[WorkerAddress]) -> None:
        raise NotImplementedError

    def has_gone(self, address: WorkerAddress) -> bool:
        return address.model_name in self.gone

    async def close(self) -> None:
        raise NotImplementedError

    def records(self) -> list[WorkerRecord]:
        return self.known

    async def refresh(self) -> None:
        self.num_refreshes += 1
        self.known, self.arriving = [*self.known, *self.arriving], []

    def is_alive(self, worker_id: str, epoch: str) -> bool:
        names = {(known.worker_id, known.epoch): known.model_name for known in self.known}
        return names.get((worker_id, epoch), "unknown") not in {*self.dead, "unknown"}

    async def stream(self, number: int) -> FakeStream:
        """The stream started as the `number`-th, counting from 0, as soon as it is."""
        await until(lambda: len(self.streams) > number, f"start of stream {number}")
        return self.streams[number]

    async def all_closed(self) -> None:
        await until(lambda: all(stream.is_closed for stream in self.streams), "closing of all streams")


def prepared(num_tokens: int = 4) -> PreparedPrompt:
    ids = np.arange(100, 100 + num_tokens, dtype=np.int32)
    message = Prepared(seed_hash_hex="0" * 32, model_id=LAYOUT.model_id)
    return PreparedPrompt(ids, [], message, "the prompt ")


def job(num_tokens: int = 4, seconds_left: float = 60.0, generated: tuple[int, ...] = (), **sampling: object) -> Job:
    return Job(
        request_id="r",
        prompt=prepared(num_tokens),
        sampling=SamplingParams.model_validate({"max_tokens": 16, **sampling}),
        deadline_s=time.monotonic() + seconds_left,
        arrival_ns=1,
        generated=list(generated),
    )


def attempt_parts(workers: FakeWorkers, closer: StreamCloser, **patience: float) -> AttemptParts:
    """`patience` overrides `RouterConfig`."""
    return AttemptParts(workers, workers, FakeClock(), Patience.of(RouterConfig(**patience)), closer.retire)


class FakePreprocess:
    """Answers when `gate` is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: KelpError | None = None

    async def prepare(self, request: LlmRequest) -> PreparedPrompt:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return prepared()


class LetterDetokenizer:
    """Token *t* is the letter with code *t*; keeps the last letter back until the next one or the end."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_ids: list[int]) -> str:
        text = self._held + "".join(map(chr, token_ids))
        self._held = text[-1:]
        return text[:-1]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class FakeText:
    """Text parts in which tokens are letters."""

    eos_token_ids = frozenset({EOS})

    def detokenizer(self) -> LetterDetokenizer:
        return LetterDetokenizer()

    def stop_matcher(self, words: tuple[str, ...]) -> StopWords:
        return StopWords(words)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@dataclass
class Desk:
    """The decision with its books, as `router.stack` puts them together, but without sockets."""

    selector: Selector
    own: OwnLoads
    admission: Admission
    placer: Placer
    ledger: Ledger
    clock: Clock

    async def explain(self, request_id: str) -> bytes | None:
        for name in meant_by(request_id):
            explanation = self.selector.explain(name)
            if explanation is not None:
                return encode_message(explanation.model_copy(update={"request_id": shown(name)}))
        return None


def open_desk(
    workers: FakeWorkers,
    metrics: Metrics | None = None,
    clock: Clock | None = None,
    queue: QueueConfig | None = None,
    **mode: object,
) -> Desk:
    """A placer among the given workers; `mode` has the fields of `SelectorMode`."""
    metrics, clock, queue, table = metrics or Metrics(), clock or SystemClock(), queue or QueueConfig(), WorkerTable()
    settings = SelectorMode(**{"policy": "least-loaded", **mode})
    selector = Selector(table, KVIndex(clock), RoutingConfig(), clock, 0, settings)
    own = OwnLoads("router", 1)
    ledger = Ledger(selector, own, settings.policy, metrics)
    capacity = Capacity(table, selector.fleet, selector.load, queue)
    admission = Admission(selector, ledger, capacity, queue, clock, metrics)
    return Desk(selector, own, admission, Placer(workers, selector, admission, ledger, clock), ledger, clock)


def on_paper(decision: Decision) -> Placement:
    """A placement that nobody has reserved: what it tells is about an unknown request."""
    desk = open_desk(FakeWorkers(*filter(None, (decision.prefill, decision.decode))))
    return Placement(decision, desk.ledger, desk.clock)


@dataclass
class RouterRig:
    """A whole router; `ask` starts a request."""

    service: RouterService
    workers: FakeWorkers
    preprocess: FakePreprocess
    outbox: Outbox[RelayItem]
    desk: Desk
    metrics: Metrics
    requests: list[asyncio.Task[None]] = field(default_factory=list)

    def ask(self, **inputs: npt.NDArray[np.generic] | str) -> tuple[FakeExchange, asyncio.Task[None]]:
        tensors = {name: bytes_tensor(value) if isinstance(value, str) else value for name, value in inputs.items()}
        exchange = FakeExchange({"text_input": bytes_tensor("hello"), **tensors})
        return exchange, self.serve(exchange)

    def serve(self, exchange: FakeExchange) -> asyncio.Task[None]:
        task = asyncio.ensure_future(self.service.handle(exchange))
        self.requests.append(task)
        return task

    def counters(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        counters, _, _ = self.metrics.take()
        return {(family.name, labels): value for (family, labels), value in counters.items()}

    async def all_is_returned(self) -> None:
        """Every stream is closed, and no worker counts as busy."""
        await self.workers.all_closed()
        await until(lambda: not self.num_active, "return of all in-flight counts")
        assert self.desk.own.snapshot().loads == ()

    @property
    def num_active(self) -> int:
        """Requests counted on workers."""
        return int(self.desk.selector.load.active.sum())


@contextlib.asynccontextmanager
async def open_router(*records: WorkerRecord, **config: object) -> AsyncIterator[RouterRig]:
    """A router among the given workers; `config` overrides `RouterConfig`."""
    settings = RouterConfig.model_validate({"cancel_poll_s": 0.002, "policy": "least-loaded", **config})
    workers, closer, metrics, preprocess = FakeWorkers(*records), StreamCloser(), Metrics(), FakePreprocess()
    desk = open_desk(workers, metrics, policy=settings.policy, disaggregation=settings.disaggregation)
    outbox: Outbox[RelayItem] = Outbox("outbox under test")
    watch = CancelWatch(settings.cancel_poll_s)
    parts = RouterParts(
        preprocess=preprocess,
        text=FakeText(),
        placer=desk.placer,
        versions=Versions("text", workers.records, lambda: next(iter(workers.traffic), None), metrics),
        attempts=replace(attempt_parts(workers, closer), patience=Patience.of(settings)),
        cancel_watch=watch,
        outbox=outbox,
        clock=FakeClock(),
        metrics=metrics,
        explain=desk.explain,
    )
    rig = RouterRig(RouterService(parts, settings), workers, preprocess, outbox, desk, metrics)
    try:
        yield rig
    finally:
        for request in rig.requests:
            request.cancel()
        await asyncio.gather(*rig.requests, return_exceptions=True)
        await closer.wait()
        watch.close()
        outbox.close()
