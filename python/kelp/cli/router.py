"""`kelp router`: the decision alone, for stacks that bring their own workers."""

from __future__ import annotations

import asyncio
import os
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from kelp.build.standalone import build_router_server
from kelp.cli.options import ConfigFile, effective_config
from kelp.core.errors import ConfigError
from kelp.router.api.auth import read_token
from kelp.router.api.server import ListenOptions, Ports, stop_on_signals


def router_command(
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless asked otherwise.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 takes a free one.")] = 9100,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0 takes a free one.")] = 9101,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that callers must show (at least 16 characters).")
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Ask for no token even on an address that others can reach.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Tells this router from others of the same workers (default: its process id).")
    ] = None,
    config: ConfigFile = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any field: group.field=value.")] = None,
) -> None:
    """Serve routing decisions over HTTP and gRPC until Ctrl-C or SIGTERM."""
    if token_file is None and not open_to_all and not _is_loopback(host):
        raise ConfigError(f"--host {host}: give --token-file, or --open to let everybody in who reaches it")
    token = None if token_file is None else read_token(token_file)
    options = ListenOptions(host, http_port, grpc_port, token)
    effective = effective_config(config, {}, [], settings or [])

    async def run() -> None:
        stopping = asyncio.Event()
        stop_on_signals(stopping)
        await build_router_server(effective, name or f"router-{os.getpid()}").run(
            options, lambda ports: _say_ready(options, ports), stopping
        )

    asyncio.run(run())


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say_ready(options: ListenOptions, ports: Ports) -> None:
    access = "no token" if options.token is None else "bearer token required"
    print(
        f"kelp router on {options.host}: HTTP {ports.http}, gRPC {ports.grpc} ({access}); Ctrl-C stops it", flush=True
    )
