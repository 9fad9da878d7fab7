"""A worker: its engine, its KV and what makes it visible."""

from __future__ import annotations

import os
from dataclasses import replace

from kelp.core.clock import SystemClock
from kelp.core.config import KelpConfig
from kelp.core.metrics import Metrics
from kelp.core.model_identity import text_identity
from kelp.core.peer_auth import token_of_server
from kelp.executor.base import TieredExecutor
from kelp.kv.events import EventPublisher
from kelp.kv.handoff import HandoffReader, HandoffServer
from kelp.registry.access import RegistryAccess, open_registry
from kelp.transport import open_agent
from kelp.transport.layout import describe_pool, pool_region
from kelp.worker.parts import WorkerIdentity, WorkerParts
from kelp.worker.service import WorkerService
from kelp.worker.tiers import TierParts, WorkerTiers


def build_executor(config: KelpConfig) -> TieredExecutor:
    """The engine of one worker; loads the weights."""
    if config.executor.engine == "mock":
        from kelp.executor.mock.load import load_mock_executor

        return load_mock_executor(config.model.path, config.executor, config.mock)
    from kelp.executor.torch.load import load_torch_executor
    from kelp.executor.torch.options import TorchExecutorOptions

    threads = config.executor.threads or max(1, (os.cpu_count() or 1) // config.server.workers_on_host)
    options = TorchExecutorOptions.from_config(config.executor, config.executor.device, threads)
    return load_torch_executor(config.model.path, replace(options, lora_adapters=config.model.lora_adapters))


def build_worker(identity: WorkerIdentity, config: KelpConfig, metrics: Metrics) -> WorkerService:
    """One worker; blocks while the model loads."""
    identity = replace(identity, text_id=text_identity(config.model.path))
    executor = build_executor(config)
    layout, memory = executor.layout, executor.pool_memory
    agent = open_agent(config.handoff.transport, identity.worker_id)
    region = pool_region(layout, memory.base_address, memory.device)
    agent.register(region, memory.owner)
    description = describe_pool(agent, layout, region, identity.worker_id, identity.epoch)
    clock, token = SystemClock(), token_of_server(config.peers, "worker")
    registry = open_registry(config.registry, token)
    registry.workers.sweep()
    events = None
    if config.events.enabled:
        events = EventPublisher(identity.epoch, layout.block_size, config.events, clock, token)
    parts = WorkerParts(
        executor=executor,
        handoffs=HandoffServer(description, config.handoff, clock, token=token),
        reader=HandoffReader(agent, layout, config.handoff, clock, token),
        agent=agent,
        registry=registry.workers,
        clock=clock,
        metrics=metrics,
        events=events,
        token=token,
    )
    if config.kv_manager.enabled or config.offload.use_other_hosts:
        parts = replace(parts, tiers=_tiers(identity, config, executor, parts, registry))
    return WorkerService(identity, parts, config)


def _tiers(
    identity: WorkerIdentity,
    config: KelpConfig,
    executor: TieredExecutor,
    parts: WorkerParts,
    registry: RegistryAccess,
) -> WorkerTiers:
    # Here, because a worker without lower tiers need not pay for it: tritonclient takes a while to import.
    from kelp.client.grpc.kv_manager import GrpcKvManagerClient

    tiers = TierParts(
        key=(identity.worker_id, identity.epoch),
        name=identity.model_name,
        executor=executor,
        agent=parts.agent,
        client=GrpcKvManagerClient(parts.token),
        managers=registry.kv_managers.snapshot,
        clock=parts.clock,
        metrics=parts.metrics,
        config=config,
    )
    return WorkerTiers(tiers)
