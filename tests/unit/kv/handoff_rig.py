"""A prefill and a decode worker's halves of the handoff in one process: local transport, real gRPC on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np

from kelp.core.clock import FakeClock
from kelp.core.config import HandoffConfig
from kelp.core.errors import KelpError, from_message
from kelp.core.handoff_messages import HANDOFF_EVENT, HandoffEvent, HandoffFailed
from kelp.core.messages import Rendezvous
from kelp.core.peer_auth import PeerToken
from kelp.core.types import BlockId, KVLayout
from kelp.core.wire import Message, decode_message, encode_message
from kelp.kv.handoff import FetchPlan, FetchResult, HandoffReader, HandoffServer, Offer
from kelp.kv.handoff.wire import ATTACH, rpc_path
from kelp.transport.layout import describe_pool, pool_region
from kelp.transport.local import LocalAgent, ReadFaults

LAYOUT = KVLayout(16, num_layers=1, num_kv_heads=1, block_size=4, head_dim=2, dtype="float32", model_id="m")
EPOCH = "epoch-1"
TTL_S = 10.0
UNTOUCHED = 255


async def until(predicate: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while not predicate():
        assert loop.time() < deadline_s, "the condition never came true"
        await asyncio.sleep(0.001)


class RawReader:
    """An `Attach` stream on which a test says what it likes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = channel.stream_stream(rpc_path(ATTACH))()

    async def say(self, message: Message | bytes) -> None:
        await self._call.write(message if isinstance(message, bytes) else encode_message(message))

    async def hear(self) -> HandoffEvent:
        return decode_message(HANDOFF_EVENT, await self._call.read(), "event")

    async def hear_error(self) -> KelpError:
        event = await self.hear()
        assert isinstance(event, HandoffFailed), event
        return from_message(event.message)

    def hang_up(self) -> None:
        self._call.cancel()


@dataclass
class Rig:
    """See the module docstring. Block *b* of the prefill pool is filled with the byte *b*."""

    server: HandoffServer
    reader: HandoffReader
    endpoint: str
    channel: grpc.aio.Channel
    faults: ReadFaults
    decode_agent: LocalAgent
    remote: np.ndarray
    local: np.ndarray
    prefill_clock: FakeClock
    decode_clock: FakeClock
    released: list[str] = field(default_factory=list)

    def offer(self, handoff_id: str = "h") -> Offer:
        return self.server.offer(handoff_id, lambda: self.released.append(handoff_id))

    def finished_offer(self, num_tokens: int = 8, block_ids: tuple[int, ...] = (3, 5)) -> Offer:
        offer = self.offer()
        offer.announce(num_tokens, [BlockId(block_id) for block_id in block_ids])
        offer.finish(42, -0.5)
        return offer

    def raw_reader(self) -> RawReader:
        return RawReader(self.channel)

    def start_fetch(
        self, num_tokens: int = 8, num_cached: int = 0, deadline_s: float | None = None, epoch: str = EPOCH
    ) -> asyncio.Task[FetchResult]:
        num_blocks = -(-num_tokens // LAYOUT.block_size)
        plan = FetchPlan(tuple(map(BlockId, range(num_blocks))), num_cached, num_tokens, deadline_s)
        rendezvous = Rendezvous(handoff_id="h", endpoint=self.endpoint, prefill_epoch=epoch)
        return asyncio.create_task(self.reader.fetch(rendezvous, plan))

    def arrived(self, num_blocks: int) -> list[int]:
        """First byte of the first local blocks."""
        return [int(row[0]) for row in self.local[:num_blocks]]

    async def all_is_returned(self) -> None:
        await until(lambda: self.server.num_leases == 0 and self.server.num_readers == 0)
        assert self.reader.num_fetches == 0


def pool(num_blocks: int) -> np.ndarray:
    return np.full((num_blocks, LAYOUT.block_bytes), UNTOUCHED, dtype=np.uint8)


@contextlib.asynccontextmanager
async def open_rig(
    *,
    prefill_layout: KVLayout = LAYOUT,
    decode_agent_type: type[LocalAgent] = LocalAgent,
    max_readers: int = 8,
    tokens: tuple[PeerToken | None, PeerToken | None] = (None, None),
    **config: float,
) -> AsyncIterator[Rig]:
    """A rig whose clocks stand still; `tokens` of prefill and decode; `config` overrides `HandoffConfig`."""
    settings = HandoffConfig(transport="local", **{"lease_ttl_s": TTL_S, "attach_timeout_s": 5.0, **config})
    faults, prefill_clock, decode_clock = ReadFaults(), FakeClock(), FakeClock(5000.0)
    prefill_agent, decode_agent = LocalAgent("prefill"), decode_agent_type("decode", faults)
    remote, local = pool(LAYOUT.num_blocks), pool(LAYOUT.num_blocks)
    remote[:] = np.arange(LAYOUT.num_blocks)[:, None]
    region = pool_region(prefill_layout, remote.ctypes.data, "cpu")
    prefill_agent.register(region, remote)
    decode_agent.register(pool_region(LAYOUT, local.ctypes.data, "cpu"), local)
    description = describe_pool(prefill_agent, prefill_layout, region, "prefill", EPOCH)
    server = HandoffServer(description, settings, prefill_clock, max_readers, tokens[0])
    reader = HandoffReader(decode_agent, LAYOUT, settings, decode_clock, tokens[1])
    endpoint = await server.start("127.0.0.1")
    channel = grpc.aio.insecure_channel(endpoint)
    try:
        yield Rig(server, reader, endpoint, channel, faults, decode_agent, remote, local, prefill_clock, decode_clock)
    finally:
        await channel.close(None)
        await reader.close()
        await server.stop()
        prefill_agent.close()
        decode_agent.close()
