"""Which servers start with which models, and on which command line."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kelp.core.config import KelpConfig, load_config
from kelp.core.schema import MODEL_SCHEMAS
from kelp.core.schema_types import ModelSchema
from kelp.supervisor.plan import (
    MODELS_BESIDE_WORKERS,
    ServeOptions,
    ServerSpec,
    WorkerSpec,
    plan_servers,
    router_model_config,
    worker_model_config,
    worker_names,
    write_config,
)
from kelp.supervisor.server import Launch, command_line, shm_prefix
from kelp.supervisor.shm import BYTES_PER_MODEL

LAUNCH = Launch(Path("/t/bin/tritonserver"), {}, Path("/k/model_repository"), Path("/k/backends"), Path("/run"))


def options(num_prefill: int = 1, num_decode: int = 1, is_isolated: bool = False) -> ServeOptions:
    return ServeOptions(
        config=KelpConfig(),
        host="127.0.0.1",
        http_port=8000,
        grpc_port=8001,
        metrics_port=8002,
        num_prefill=num_prefill,
        num_decode=num_decode,
        is_isolated=is_isolated,
        startup_timeout_s=60.0,
    )


def plan(**numbers: int | bool) -> list[ServerSpec]:
    ports = itertools.count(9000)
    return plan_servers(options(**numbers), lambda host: next(ports))  # type: ignore[arg-type]


def flags(spec: ServerSpec) -> list[str]:
    return command_line(LAUNCH, spec)


def test_workers_are_named_after_their_role_and_numbered_from_the_second() -> None:
    assert [worker.name for worker in worker_names("decode", 3)] == ["decode", "decode_1", "decode_2"]
    assert {worker.role for worker in worker_names("decode", 3)} == {"decode"}
    assert worker_names("prefill", 0) == []


def test_the_compact_layout_is_one_server_with_everything() -> None:
    (server,) = plan(num_prefill=2, num_decode=3)
    assert server.on_disk_models == ("kv_block_manager", "prefill", "decode", "preprocess", "llm")
    assert [worker.name for worker in server.added_workers] == ["prefill_1", "decode_1", "decode_2"]
    assert server.model_names == (*server.on_disk_models, "prefill_1", "decode_1", "decode_2")
    assert (server.http_port, server.grpc_port, server.metrics_port) == (8000, 8001, 8002)


@pytest.mark.parametrize("is_isolated", [False, True])
def test_several_routers_are_processes_of_one_model_that_is_loaded_last(is_isolated: bool) -> None:
    config = load_config({"server.router_instances": "3"})
    planned = plan_servers(replace(options(is_isolated=is_isolated), config=config), lambda host: 9000)
    public = planned[-1]
    assert public.router_instances == 3
    assert "llm" not in public.on_disk_models
    assert public.model_names[-1] == "llm"
    assert "--load-model=llm" not in flags(public)
    assert all(server.router_instances == 1 for server in planned[:-1])


def test_routers_that_are_loaded_look_like_the_one_on_disk_but_for_their_number() -> None:
    config = router_model_config(3)
    assert config["instance_group"] == [{"count": 3, "kind": "KIND_CPU"}]
    (schema,) = [schema for schema in MODEL_SCHEMAS if schema.name == "llm"]
    assert [tensor["name"] for tensor in config["input"]] == [spec.name for spec in schema.inputs]
    assert config["backend"] == schema.backend


def test_aggregated_serving_has_no_prefill_worker() -> None:
    (server,) = plan(num_prefill=0)
    assert server.on_disk_models == ("kv_block_manager", "decode", *MODELS_BESIDE_WORKERS)


def test_the_isolated_layout_has_a_server_per_worker_and_the_public_one_last() -> None:
    manager, *workers, public = plan(num_prefill=1, num_decode=2, is_isolated=True)
    assert (manager.name, manager.model_names) == ("kelp-kv_block_manager", ("kv_block_manager",))
    assert [worker.model_names for worker in workers] == [("prefill",), ("decode",), ("decode_1",)]
    assert (public.name, public.model_names) == ("kelp", MODELS_BESIDE_WORKERS)
    assert all(worker.http_port is None for worker in workers)
    ports = [port for server in (manager, *workers, public) for port in (server.grpc_port, server.metrics_port)]
    assert len(set(ports)) == len(ports)
    assert len({server.name for server in (manager, *workers, public)}) == 5


def test_only_the_isolated_layouts_public_server_ends_with_its_only_router() -> None:
    assert [spec.ends_with_router for spec in plan(is_isolated=True)][-2:] == [False, True]
    assert [spec.ends_with_router for spec in plan(is_isolated=False)] == [False]
    config = load_config({"server.router_instances": "3"})
    planned = plan_servers(replace(options(is_isolated=True), config=config), lambda host: 9000)
    assert not planned[-1].ends_with_router


@pytest.mark.parametrize("is_isolated", [False, True])
def test_without_a_kv_block_manager_none_is_planned(is_isolated: bool) -> None:
    config = load_config({"kv_manager.enabled": "false"})
    planned = plan_servers(replace(options(is_isolated=is_isolated), config=config), lambda host: 9000)
    assert all("kv_block_manager" not in server.model_names for server in planned)


def test_the_command_line_is_the_documented_one_plus_addresses() -> None:
    (server,) = plan()
    command = flags(server)
    assert command[0] == "/t/bin/tritonserver"
    for flag in (
        "--model-repository=/k/model_repository",
        "--backend-directory=/k/backends",
        "--model-control-mode=explicit",
        "--strict-readiness=false",
        "--load-model=llm",
        "--load-model=preprocess",
        "--load-model=prefill",
        "--load-model=decode",
        "--http-port=8000",
        "--grpc-port=8001",
        "--metrics-port=8002",
    ):
        assert flag in command, flag


def test_every_listener_is_bound_to_the_chosen_address() -> None:
    (server,) = plan()
    bound = {flag for flag in flags(server) if "-address=" in flag}
    assert bound == {f"--{service}-address=127.0.0.1" for service in ("http", "grpc", "metrics")}


def test_an_isolated_worker_has_no_http_listener() -> None:
    worker = plan(is_isolated=True)[0]
    assert "--allow-http=false" in flags(worker)
    assert not [flag for flag in flags(worker) if flag.startswith("--http-")]


def test_workers_that_are_not_on_disk_are_not_asked_of_triton_at_start() -> None:
    (server,) = plan(num_decode=2)
    assert "--load-model=decode_1" not in flags(server)


def test_every_backend_gets_the_servers_own_shared_memory_prefix_and_size() -> None:
    first, second = plan(is_isolated=True)[:2]
    assert shm_prefix(first) != shm_prefix(second)
    assert not shm_prefix(first).startswith(shm_prefix(second))
    backends = {schema.backend for schema in MODEL_SCHEMAS} | {"python"}
    for backend in backends:
        assert f"--backend-config={backend},shm-region-prefix-name={shm_prefix(first)}" in flags(first)
        assert f"--backend-config={backend},shm-default-byte-size={BYTES_PER_MODEL}" in flags(first)


@pytest.mark.parametrize("other_port", [80, 80010, 18001])
def test_a_prefix_never_covers_another_port(other_port: int) -> None:
    spec = ServerSpec("s", "127.0.0.1", 8001, None, 1, ())
    other = ServerSpec("s", "127.0.0.1", other_port, None, 1, ())
    assert not shm_prefix(other).startswith(shm_prefix(spec))
    assert not shm_prefix(spec).startswith(shm_prefix(other))


@pytest.mark.parametrize("schema", [schema for schema in MODEL_SCHEMAS if schema.name in ("prefill", "decode")])
def test_a_further_worker_has_the_configuration_of_the_first(schema: ModelSchema) -> None:
    config = worker_model_config(WorkerSpec(f"{schema.name}_1", schema.name))
    assert config["name"] == f"{schema.name}_1"
    assert config["backend"] == schema.backend
    assert config["max_batch_size"] == 0
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert [tensor["name"] for tensor in config["input"]] == ["command", "input_ids"]
    assert [tensor["optional"] for tensor in config["input"]] == [False, True]
    assert json.loads(json.dumps(config)) == config, "Triton takes it as JSON"


def test_the_written_configuration_is_read_back_unchanged(tmp_path: Path) -> None:
    config = load_config({"executor.dtype": "float32", "handoff.lease_ttl_s": "2.5", "registry.path": str(tmp_path)})
    write_config(config, tmp_path / "kelp.yaml")
    assert load_config(path=tmp_path / "kelp.yaml") == config


def test_listening_everywhere_opens_the_public_server_alone() -> None:
    everywhere = replace(options(is_isolated=True), host="0.0.0.0")
    servers = plan_servers(everywhere, lambda host: 9000)
    assert [server.host for server in servers] == ["127.0.0.1"] * (len(servers) - 1) + ["0.0.0.0"]
    assert servers[-1].grpc_endpoint.startswith("127.0.0.1:")
