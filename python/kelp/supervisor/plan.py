"""What `kelp serve` will start: which servers, which models in each, with which configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kelp.core.config import KelpConfig
from kelp.core.schema import KV_BLOCK_MANAGER, LLM, worker_schema
from kelp.core.schema_types import ModelSchema, TensorSpec
from kelp.supervisor.ports import own_address

PortPicker = Callable[[str], int]
"""Returns an unused port of a host."""

MODELS_BESIDE_WORKERS = ("preprocess", "llm")
"""The public entry and its tokeniser; in the isolated layout they have a server of their own."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the user asked for."""

    config: KelpConfig
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    num_prefill: int
    num_decode: int
    is_isolated: bool
    startup_timeout_s: float


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker model: `role` picks the backend, `name` is `role` or `role_<n>`, with the version between them.

    Attributes:
        version: Other than the server's own, side by side with it; empty for that.
    """

    name: str
    role: str
    version: str = ""

    @property
    def is_on_disk(self) -> bool:
        """Whether model_repository has it, so that Triton can load it by itself."""
        return self.name == self.role


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One tritonserver.

    Attributes:
        http_port: None for a server that only other kelp processes talk to.
        on_disk_models: Loaded by Triton at start.
        added_workers: Loaded through the repository API once it is up.
        router_instances: Processes of `llm`, if more than the one on disk; loaded once the workers are.
    """

    name: str
    host: str
    grpc_port: int
    http_port: int | None
    metrics_port: int
    on_disk_models: tuple[str, ...]
    added_workers: tuple[WorkerSpec, ...] = ()
    router_instances: int = 1

    @property
    def model_names(self) -> tuple[str, ...]:
        """Everything that must be ready."""
        routers = (LLM.name,) if self.router_instances > 1 else ()
        return (*self.on_disk_models, *(worker.name for worker in self.added_workers), *routers)

    @property
    def ends_with_router(self) -> bool:
        """Whether nothing is lost with this server that is not lost with its router's process."""
        return set(self.model_names) == set(MODELS_BESIDE_WORKERS) and self.router_instances == 1

    @property
    def grpc_endpoint(self) -> str:
        """`host:port` at which this host reaches the gRPC service."""
        return f"{own_address(self.host)}:{self.grpc_port}"


def worker_names(role: str, count: int, version: str = "") -> list[WorkerSpec]:
    """The names `role`, `role_1`, `role_2` and so on; of another version `role_v2`, `role_v2_1`."""
    first = f"{role}_{version}" if version else role
    return [WorkerSpec(first if index == 0 else f"{first}_{index}", role, version) for index in range(count)]


def plan_servers(options: ServeOptions, pick_port: PortPicker) -> list[ServerSpec]:
    """The servers to start: those of workers before the public one, which looks for them, as they for the manager."""
    workers = worker_names("prefill", options.num_prefill) + worker_names("decode", options.num_decode)
    managers = (KV_BLOCK_MANAGER.name,) if options.config.kv_manager.enabled else ()
    instances = options.config.server.router_instances
    beside = tuple(name for name in MODELS_BESIDE_WORKERS if instances == 1 or name != LLM.name)
    public = ServerSpec(
        name="kelp",
        host=options.host,
        grpc_port=options.grpc_port,
        http_port=options.http_port,
        metrics_port=options.metrics_port,
        on_disk_models=beside,
        router_instances=instances,
    )
    if options.is_isolated:
        alone = (*(WorkerSpec(name, name) for name in managers), *workers)
        return [*(isolated_server(model, options.host, pick_port) for model in alone), public]
    on_disk = (*managers, *(worker.name for worker in workers if worker.is_on_disk))
    added = tuple(worker for worker in workers if not worker.is_on_disk)
    return [replace(public, on_disk_models=(*on_disk, *beside), added_workers=added)]


def isolated_server(worker: WorkerSpec, host: str, pick_port: PortPicker) -> ServerSpec:
    """A server for one worker (or the KV block manager) alone: no crash takes a neighbour along.

    It listens for processes of this host only; clients use the public one.
    """
    host = own_address(host)
    return ServerSpec(
        name=f"kelp-{worker.name}",
        host=host,
        grpc_port=pick_port(host),
        http_port=None,
        metrics_port=pick_port(host),
        on_disk_models=(worker.name,) if worker.is_on_disk else (),
        added_workers=() if worker.is_on_disk else (worker,),
    )


def write_config(config: KelpConfig, path: Path) -> None:
    """Write the effective configuration where the models read it."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def worker_model_config(worker: WorkerSpec, settings: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Triton configuration of a worker that is not on disk; `settings` are fields of its own, as `group.field`."""
    config = _model_config(worker_schema(worker.name, worker.role), 1)
    if not settings:
        return config
    return {**config, "parameters": {name: {"string_value": value} for name, value in settings.items()}}


def router_model_config(num_instances: int) -> dict[str, Any]:
    """Triton configuration of `llm` in several processes, each a router of its own."""
    return _model_config(LLM, num_instances)


def _model_config(schema: ModelSchema, num_instances: int) -> dict[str, Any]:
    return {
        "name": schema.name,
        "backend": schema.backend,
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": schema.is_decoupled},
        "instance_group": [{"count": num_instances, "kind": "KIND_CPU"}],
        "input": [{**_tensor(spec), "optional": spec.optional} for spec in schema.inputs],
        "output": [_tensor(spec) for spec in schema.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": spec.datatype.config_name, "dims": list(spec.dims)}
