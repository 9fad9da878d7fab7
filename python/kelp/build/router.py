"""The `llm` model."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kelp.client.base import WorkerClient
from kelp.client.direct.dialling import Dialling
from kelp.client.grpc import GrpcWorkerClient
from kelp.client.workers import ShortestWay
from kelp.core.cancel_watch import CancelWatch
from kelp.core.clock import SystemClock
from kelp.core.config import KelpConfig
from kelp.core.metrics import Metrics
from kelp.core.model_identity import text_identity
from kelp.core.outbox import Outbox
from kelp.core.peer_auth import PeerToken, token_of_server
from kelp.registry.access import open_memory, open_registry
from kelp.registry.view import RecordsView, RegistryView
from kelp.router.attempt import AttemptParts, address_of
from kelp.router.patience import Patience
from kelp.router.relay import RelayItem
from kelp.router.service import Preprocess, RouterParts, RouterService, StreamCloser
from kelp.router.stack import Registries, RoutingStack
from kelp.router.versions import Versions
from kelp.text.detokenizer import Detokenizer, new_detokenizer
from kelp.text.stop_words import StopWords
from kelp.text.tokenizer import Tokenizer

_VIEW_REFRESHES_PER_HEARTBEAT = 4


class ModelText:
    """Text parts of the served model; implements `router.service.TextFactory`."""

    def __init__(self, model_folder: Path) -> None:
        self._tokenizer = Tokenizer(model_folder)
        self.eos_token_ids = frozenset(self._tokenizer.eos_token_ids)

    def detokenizer(self) -> Detokenizer:
        """See `TextFactory`."""
        return new_detokenizer(self._tokenizer)

    def stop_matcher(self, words: tuple[str, ...]) -> StopWords:
        """See `TextFactory`."""
        return StopWords(words)


def build_client(config: KelpConfig, token: PeerToken | None) -> WorkerClient:
    """Connections to workers; made on the event loop that uses them."""
    triton = GrpcWorkerClient(token)
    return ShortestWay(Dialling(token), triton) if config.direct.enabled else triton


class RouterAssembly:
    """The router with everything that runs beside it; made and used on one event loop."""

    def __init__(self, config: KelpConfig, router_id: str, preprocess: Preprocess, metrics: Metrics) -> None:
        clock, token = SystemClock(), token_of_server(config.peers, "router")
        registry, memory = open_registry(config.registry, token), open_memory(config.registry, token)
        registry.routers.sweep()
        refresh_s, grace_s = config.registry.heartbeat_s / _VIEW_REFRESHES_PER_HEARTBEAT, config.registry.expiry_s
        view = RegistryView(registry.workers, refresh_s, grace_s, clock, memory.workers)
        managers = RecordsView(registry.kv_managers.snapshot, refresh_s, grace_s, clock, memory.kv_managers)
        traffic = RecordsView(registry.traffic.snapshot, refresh_s, 0.0, clock, memory.traffic)
        registries = Registries(view, managers, registry.routers, traffic)
        self._stack = RoutingStack(config, router_id, registries, clock, metrics, token)
        self._client = build_client(config, token)
        self._stack.on_workers = lambda ready: self._client.expect(map(address_of, ready))
        self._closer = StreamCloser()
        self._outbox: Outbox[RelayItem] = Outbox("kelp-relay")
        self._cancel_watch = CancelWatch(config.router.cancel_poll_s)
        attempts = AttemptParts(self._client, view, clock, Patience.of(config.router), self._closer.retire)
        parts = RouterParts(
            preprocess=preprocess,
            text=ModelText(config.model.path),
            placer=self._stack.placer,
            versions=Versions(
                text_identity(config.model.path), view.records, lambda: next(iter(traffic.records()), None), metrics
            ),
            attempts=attempts,
            cancel_watch=self._cancel_watch,
            outbox=self._outbox,
            clock=clock,
            metrics=metrics,
            explain=self._stack.explain,
        )
        self.service = RouterService(parts, config.router)

    async def start(self) -> None:
        """Read the registry and keep reading it; follow the workers and the other routers."""
        await self._stack.start()

    async def stop(self) -> None:
        """Let go of connections and threads."""
        await self._stack.stop()
        await self._closer.wait()
        await self._client.close()
        await asyncio.to_thread(self._cancel_watch.close)
        await asyncio.to_thread(self._outbox.close)
