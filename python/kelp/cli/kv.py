"""`kelp kv`: what the KV block manager of a running server holds, and removing it."""

from __future__ import annotations

import asyncio
import enum
import json
from typing import Annotated, TypeVar

import typer

from kelp.cli.kv_report import manager_report, report_text
from kelp.cli.options import GrpcPort
from kelp.client.base import WorkerAddress
from kelp.client.grpc import GrpcKvManagerClient
from kelp.core.config import KelpConfig, load_config
from kelp.core.errors import ConfigError, NotFound, ProtocolError, from_message
from kelp.core.hashing import tenant_digest
from kelp.core.kv_manager_messages import Clear, Done, GetStats, Operation, Refused, Result, Stats
from kelp.core.peer_auth import PeerToken, load_token
from kelp.core.schema import KV_BLOCK_MANAGER
from kelp.core.types import Tier
from kelp.registry.access import open_registry
from kelp.supervisor import run_state

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
ResultT = TypeVar("ResultT", bound=Result)
Host = Annotated[str, typer.Option(help="Host of the running server.")]

kv_app = typer.Typer(no_args_is_help=True, help="The KV block manager of a running server: what it holds, clearing it.")


class TierName(str, enum.Enum):
    """Tiers below the workers' own pools."""

    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


@kv_app.command("stats")
def stats_command(
    grpc_port: GrpcPort = 8001,
    host: Host = "127.0.0.1",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every count of the manager.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long the answer may take.")] = 10.0,
) -> None:
    """Show each tier's blocks, bytes, hits, evictions and queues, as counted since the manager started."""
    address = find_manager(host, grpc_port)
    values = _ask(address, GetStats(), Stats, timeout_s).values
    report = manager_report(f"{address.endpoint}/{address.model_name}", values)
    print(json.dumps(report, indent=2) if as_json else report_text(report))


@kv_app.command("clear")
def clear_command(
    salt: Annotated[
        str | None, typer.Option(help="Remove what was computed with this cache_salt; '' is that of requests without.")
    ] = None,
    is_all: Annotated[bool, typer.Option("--all", help="Remove everybody's blocks (in the store: of this model).")] = (
        False
    ),
    tier: Annotated[list[TierName] | None, typer.Option(help="From this tier alone; may be repeated.")] = None,
    grpc_port: GrpcPort = 8001,
    host: Host = "127.0.0.1",
    timeout_s: Annotated[float, typer.Option(min=0.1, help="How long it may take; it goes on beyond.")] = 120.0,
) -> None:
    """Remove a tenant's blocks from host memory, disk and object store, and overwrite their bytes.

    Workers keep what they have in their own pools, and other hosts what they have in their memory and on their disks.
    """
    if (salt is None) == (not is_all):
        raise ConfigError("kelp kv clear: give either --salt SALT or --all")
    tenant = None if salt is None else tenant_digest(salt)
    tiers = tuple(Tier[name.name] for name in dict.fromkeys(tier or []))
    address, token = find_manager(host, grpc_port), load_token(_config_of(host, grpc_port).peers)
    num_removed = _ask(address, Clear(tenant, tiers), Done, timeout_s, token).num_blocks
    print(f"{num_removed} removed (blocks of host and disk, objects of the store)")


def find_manager(host: str, grpc_port: int) -> WorkerAddress:
    """The manager of the server behind a public gRPC port; with `kelp serve --isolate` it has a port of its own.

    Raises:
        NotFound: There is none.
        ConfigError: The registry that would know it cannot be reached.
    """
    config = _config_of(host, grpc_port)
    try:
        records = open_registry(config.registry, None).kv_managers.snapshot()
    except OSError as error:
        raise ConfigError(f"registry unreachable: {error}") from None
    if _run_of(host, grpc_port) is None:
        endpoint = f"{host}:{grpc_port}"
        epoch = next((record.epoch for record in records if record.endpoint == endpoint), "")
        return WorkerAddress(endpoint, KV_BLOCK_MANAGER.name, epoch=epoch)
    records = [record for record in records if record.endpoint.startswith(f"{config.server.host}:")]
    if not records:
        raise NotFound(
            f"the server on port {grpc_port} has no KV block manager (now): kv_manager.enabled is false, or it is "
            "being loaded"
        )
    return WorkerAddress(records[0].endpoint, records[0].model_name, epoch=records[0].epoch)


def _run_of(host: str, grpc_port: int) -> run_state.RunState | None:
    return run_state.read_state(grpc_port) if host in _LOOPBACK else None


def _config_of(host: str, grpc_port: int) -> KelpConfig:
    run = _run_of(host, grpc_port)
    return load_config(path=None if run is None else run.run_folder / "kelp.yaml")


def _ask(
    address: WorkerAddress,
    operation: Operation,
    kind: type[ResultT],
    timeout_s: float,
    token: PeerToken | None = None,
) -> ResultT:
    async def ask() -> Result:
        client = GrpcKvManagerClient(token)
        try:
            (result,) = await client.call(address, [operation], timeout_s)
        finally:
            await client.close()
        return result

    result = asyncio.run(ask())
    if isinstance(result, Refused):
        raise from_message(result.message)
    if not isinstance(result, kind):
        raise ProtocolError(f"KV block manager {address.endpoint}: answered {type(result).__name__}")
    return result
