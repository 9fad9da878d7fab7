"""Readers of whole conversations, as fuzzers drive them: no sockets, no threads, a clock that stands still.

A conversation that a reader does not like ends, or is counted; nothing may be raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from fuzz.examples import COMMAND
from fuzz.parsers import Label, WrongOutcome, check_text
from kelp.client.base import WorkerAddress, WorkerOutput
from kelp.client.direct.connection import DirectConnection
from kelp.client.direct.frames import FrameReader
from kelp.client.direct.wire import MAX_WORKER_FRAME_BYTES, Outputs, Refusal, decode_worker_frame
from kelp.core.clock import FakeClock
from kelp.core.config import EventsConfig
from kelp.core.errors import KelpError, ProtocolError
from kelp.core.hashing import seed_hash
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from kelp.core.kv_manager_messages import Join, decode_operations
from kelp.core.messages import DrainCommand, GenerateCommand, StatusCommand, WorkerStatus
from kelp.core.types import Role
from kelp.kv.events.translate import ForeignNames
from kelp.kv.manager.members import Members
from kelp.router.feed.inbox import EventInbox
from kelp.router.feed.subscription import Subscription
from kelp.router.feed.values import Action, Apply, Forget
from kelp.router.index.kv_index import KVIndex
from kelp.router.replicas import messages as replicas
from kelp.router.replicas.loads import PeerLoads
from kelp.router.replicas.peer_load import PeerLoad
from kelp.transport.base import Region
from kelp.transport.layout import device_number
from kelp.worker.channel import Channel
from kelp.worker.direct.connection import DirectParts, RouterConnection
from unit.router_api.api_rig import api_rig, worker

_LOOP = asyncio.new_event_loop()
_ADDRESS = WorkerAddress("h:1", "m", "h:2", "e")
_NOT_READ = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_TURNS = 3


def frames_of(raw: bytes) -> list[bytes]:
    """The frames of a conversation; none if it is not one."""
    try:
        return msgspec.msgpack.decode(raw, type=list[bytes])
    except _NOT_READ:
        return []


class _Transport(asyncio.Transport):
    """A socket whose other end takes everything; keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self

    def dup(self) -> _Transport:
        return self

    def setsockopt(self, *_: int) -> None:
        pass

    def send(self, data: bytes) -> int:
        self.written += data
        return len(data)

    def write(self, data: Any) -> None:
        self.written += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True


class _Worker:
    """Refuses every request, and says how it is."""

    async def generate(self, command: GenerateCommand, prompt: np.ndarray[Any, Any], channel: Channel) -> None:
        raise ProtocolError(f"request {command.request_id}: {prompt.size} tokens")

    async def control(self, command: DrainCommand | StatusCommand) -> WorkerStatus:
        return WorkerStatus(
            worker="w", epoch="e", role=Role.DECODE, state="ready", num_running=0, num_waiting=0, num_blocks=1,
            num_free_blocks=1, num_cached_blocks=0, num_leases=0,
        )  # fmt: skip


def run_on_loop(work: Callable[[], Any]) -> Any:
    """Do something on the loop; what is raised in its callbacks is raised here."""
    raised: list[BaseException] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        raised.append(context.get("exception") or WrongOutcome(str(context.get("message"))))

    _LOOP.set_exception_handler(note)
    result = _LOOP.run_until_complete(work())
    if raised:
        raise raised[0]
    return result


def worker_end(raw: bytes) -> object:
    """What a router may send to a worker; the router must be able to read what it hears."""
    frames = frames_of(raw)
    transport = _Transport()

    async def feed() -> None:
        parts = DirectParts(_Worker(), "h:1/m", "e", 5.0)
        connection = RouterConnection(parts, None, lambda _: None)
        connection.connection_made(transport)
        for frame in frames:
            connection.data_received(frame)
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    run_on_loop(feed)
    heard = FrameReader("worker", MAX_WORKER_FRAME_BYTES).feed(bytes(transport.written))
    told: list[str] = []
    for one in heard:
        frame = decode_worker_frame(one, "worker")
        if isinstance(frame, Refusal):
            told.append(frame.error[:40])
        told += [item.error[:40] or "said" for item in frame.items] if isinstance(frame, Outputs) else []
    return Label(" ".join(told))


def router_end(raw: bytes) -> object:
    """What a worker may answer to a router that has two requests and a question open."""
    frames = frames_of(raw)
    heard: list[str] = []

    def receive(said: WorkerOutput | KelpError | None) -> None:
        if isinstance(said, KelpError):
            check_text(said.text)
        heard.append(type(said).__name__)

    async def feed() -> None:
        connection = DirectConnection(_ADDRESS, lambda: None)
        connection.connection_made(_Transport())
        asked = [connection.start(COMMAND, np.zeros(2, np.int32), receive) for _ in range(2)]
        status = asyncio.ensure_future(connection.control(StatusCommand()))
        await asyncio.sleep(0)
        for frame in frames:
            connection.data_received(frame)
        connection.connection_lost(None)
        if connection.welcomed.exception() is not None:
            heard.append("refused")
        try:
            heard.append(type(await status).__name__)
        except KelpError as error:
            heard.append(type(error).__name__)
        if not all(stream.has_ended for stream in asked):
            raise WrongOutcome("a request was forgotten")

    run_on_loop(feed)
    return Label(" ".join(heard[-8:]))


class _Agent:
    """Makes of a pool what a real agent does before it calls its library."""

    def connect(self, metadata: bytes, region: Region) -> None:
        device_number(region)

    def disconnect(self, peer: object) -> None:
        pass


def join_manager(raw: bytes) -> object:
    """A worker that introduces its pool to the KV block manager."""
    operations = [operation for operation in decode_operations(raw) if isinstance(operation, Join)]

    async def feed() -> int:
        members = Members(_Agent(), 64, FakeClock())  # type: ignore[arg-type]
        try:
            joined = [members.join(operation) for operation in operations]
            for member in joined:
                await members.peer(member)
            return len(joined)
        finally:
            members.close()

    return run_on_loop(feed)


def feed_events(raw: bytes) -> object:
    """A router that follows a publisher: what it is sent, or answered, goes through to its index."""
    try:
        heard = msgspec.msgpack.decode(raw, type=list[list[Any]])
    except _NOT_READ:
        return None
    subscription = Subscription(EventsConfig(), can_ask=True)
    inbox = EventInbox("e", subscription, 1 << 22)
    names = ForeignNames(4, lambda lora, salt: seed_hash("m", lora, salt), max_names=8)
    index = KVIndex(FakeClock(), max_bytes=1 << 20)
    attempt = _apply(subscription.start(0.0), names, index, 0)
    for now_s, message in enumerate(heard[:64]):
        kind, frames = (message or [0])[0], [frame for frame in message[1:] if isinstance(frame, bytes)]
        if kind == 0:
            actions = inbox.on_live(frames, float(now_s))
        elif kind == 1:
            actions = inbox.on_answer(attempt, frames, float(now_s))
        else:
            actions = subscription.on_tick(float(now_s))
        attempt = _apply(actions, names, index, attempt)
    return Label(" ".join([subscription.state.value, *sorted(inbox.num_refused), *sorted(names.num_dropped)]))


def _apply(actions: list[Action], names: ForeignNames, index: KVIndex, attempt: int) -> int:
    for action in actions:
        if isinstance(action, Forget):
            names.clear()
            index.clear(0)
        elif isinstance(action, Apply):
            for event in action.events:
                is_ours = isinstance(event, BlocksStored | BlocksRemoved | BlocksCleared)
                for own in [event] if is_ours else names.translate([event]):
                    index.apply(0, own)
        else:
            attempt = action.attempt
    return attempt


def feed_loads(raw: bytes) -> object:
    """A router that counts another one's requests."""
    rig = api_rig()
    rig.register(worker("a"))
    peer_load = PeerLoad(rig.table, rig.selector.load, rig.selector.rates, rig.clock)
    loads = PeerLoads(peer_load, 5.0, 5.0)
    loads.set_peers({"r": 1}, 0.0)
    kinds: list[str] = []
    for frame in frames_of(raw)[:16]:
        for kind in (replicas.Deltas, replicas.Snapshot):
            try:
                message = replicas.decode(kind, frame)
            except ProtocolError:
                continue
            if isinstance(message, replicas.Deltas):
                loads.receive(message, 1.0)
            else:
                loads.restore(message, 1.0)
            kinds.append(kind.__name__)
    loads.lapse(20.0)
    rig.register(worker("b"))
    rig.call("select", request_id="x", token_ids=[1, 2, 3])
    loads.set_peers({}, 30.0)
    if len(peer_load) or rig.selector.load.active.any():
        raise WrongOutcome("requests of a router that has gone are still counted")
    return Label(" ".join(kinds))
