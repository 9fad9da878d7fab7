"""Puts parts together from configuration; the only place that knows which implementation stands behind a contract."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from kelp.client.grpc import GrpcWorkerClient
from kelp.core.cancel_watch import CancelWatch
from kelp.core.clock import SystemClock
from kelp.core.config import KelpConfig
from kelp.core.metrics import Metrics
from kelp.core.outbox import Outbox
from kelp.executor.base import Executor
from kelp.kv.handoff import HandoffReader, HandoffServer
from kelp.registry.directory import DirectoryRegistry
from kelp.registry.view import RegistryView
from kelp.router.attempt import AttemptParts
from kelp.router.placement import Placer
from kelp.router.policies import make_policy
from kelp.router.relay import RelayItem
from kelp.router.service import Preprocess, RouterParts, RouterService, StreamCloser
from kelp.text.detokenizer import Detokenizer, new_detokenizer
from kelp.text.preprocess import PreprocessLimits, Preprocessor
from kelp.text.stop_words import StopWords
from kelp.text.tokenizer import Tokenizer
from kelp.transport import open_agent
from kelp.transport.layout import describe_pool, pool_region
from kelp.worker.service import WorkerIdentity, WorkerParts, WorkerService

_VIEW_REFRESHES_PER_HEARTBEAT = 4


def build_preprocessor(config: KelpConfig) -> Preprocessor:
    """What the `preprocess` model runs."""
    limits = PreprocessLimits(max_model_tokens=config.executor.max_model_tokens)
    return Preprocessor(config.model.path, limits, config.model.lora_adapters)


def build_executor(config: KelpConfig) -> Executor:
    """The engine of one worker; loads the weights."""
    from kelp.executor.torch.load import load_torch_executor
    from kelp.executor.torch.options import TorchExecutorOptions

    threads = config.executor.threads or max(1, (os.cpu_count() or 1) // config.server.workers_on_host)
    options = TorchExecutorOptions.from_config(config.executor, config.executor.device, threads)
    return load_torch_executor(config.model.path, replace(options, lora_adapters=config.model.lora_adapters))


def build_worker(identity: WorkerIdentity, config: KelpConfig, metrics: Metrics) -> WorkerService:
    """One worker; blocks while the model loads."""
    executor = build_executor(config)
    layout, memory = executor.layout, executor.pool_memory
    agent = open_agent(config.handoff.transport, identity.worker_id)
    region = pool_region(layout, memory.base_address, memory.device)
    agent.register(region, memory.owner)
    description = describe_pool(agent, layout, region, identity.worker_id, identity.epoch)
    clock = SystemClock()
    registry = DirectoryRegistry(config.registry.path, config.registry.expiry_s)
    registry.sweep()
    parts = WorkerParts(
        executor=executor,
        handoffs=HandoffServer(description, config.handoff, clock),
        reader=HandoffReader(agent, layout, config.handoff, clock),
        agent=agent,
        registry=registry,
        clock=clock,
        metrics=metrics,
    )
    return WorkerService(identity, parts, config)


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


class RouterAssembly:
    """The router with everything that runs beside it; made and used on one event loop."""

    def __init__(self, config: KelpConfig, preprocess: Preprocess, metrics: Metrics) -> None:
        clock = SystemClock()
        registry = DirectoryRegistry(config.registry.path, config.registry.expiry_s)
        self._view = RegistryView(registry, config.registry.heartbeat_s / _VIEW_REFRESHES_PER_HEARTBEAT)
        self._client = GrpcWorkerClient()
        self._closer = StreamCloser()
        self._outbox: Outbox[RelayItem] = Outbox("kelp-relay")
        self._cancel_watch = CancelWatch(config.router.cancel_poll_s)
        placer = Placer(self._view, partial(make_policy, config.router.policy), config.router.disaggregation)
        attempts = AttemptParts(self._client, self._view, clock, config.router.idle_timeout_s, self._closer.retire)
        parts = RouterParts(
            preprocess=preprocess,
            text=ModelText(config.model.path),
            placer=placer,
            attempts=attempts,
            cancel_watch=self._cancel_watch,
            outbox=self._outbox,
            clock=clock,
            metrics=metrics,
        )
        self.service = RouterService(parts, config.router)

    async def start(self) -> None:
        """Read the registry and keep reading it."""
        await self._view.refresh()
        self._refreshing = asyncio.ensure_future(self._view.run())

    async def stop(self) -> None:
        """Let go of connections and threads."""
        self._refreshing.cancel()
        await self._closer.wait()
        await self._client.close()
        await asyncio.to_thread(self._cancel_watch.close)
        await asyncio.to_thread(self._outbox.close)
