"""`kelp serve`, `supervise`, `scale` and `drain`: a Triton server and its workers."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from kelp.cli.options import ConfigFile, GrpcPort, effective_config, sayer
from kelp.core.config import KelpConfig
from kelp.core.errors import ConfigError, KelpError
from kelp.core.peer_auth import make_token_file, read_secret
from kelp.core.wire import VERSION_NAME
from kelp.supervisor import preflight, serve
from kelp.supervisor.kv_manager import arena_folder_of
from kelp.supervisor.model import prepare_model
from kelp.supervisor.plan import ServeOptions
from kelp.supervisor.ports import own_address
from kelp.supervisor.scale import Fleet, VersionBeside
from kelp.supervisor.server import Launch
from kelp.supervisor.supervise import Supervision
from kelp.supervisor.triton import find_triton, link_python_backend


class Mode(str, enum.Enum):
    """How requests are served."""

    DISAGGREGATED = "disaggregated"
    AGGREGATED = "aggregated"


def repository_root() -> Path:
    """The checkout: model_repository and backends are beside python/.

    Raises:
        ConfigError: kelp runs from somewhere else.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "model_repository").is_dir():
        raise ConfigError(f"{root}: no model_repository here; install kelp with `make setup` in its checkout")
    return root


def _for_run(
    config: KelpConfig, mode: Mode, num_workers: int, run_folder: Path, listening: tuple[str, int]
) -> KelpConfig:
    """The run's own registry and token, and what depends on the number of workers and the address."""
    defaults, address, grpc_port = KelpConfig(), own_address(listening[0]), listening[1]
    changes: dict[str, dict[str, object]] = {
        "peers": {"token_file": _token_file(config, run_folder)},
        "registry": {"path": run_folder / "registry"},
        "server": {"workers_on_host": num_workers},
    }
    if config.server.host == defaults.server.host:
        changes["server"]["host"] = address
    if config.kv_manager.arena_folder == defaults.kv_manager.arena_folder:
        changes["kv_manager"] = {"arena_folder": arena_folder_of(grpc_port)}
    if config.handoff.host == defaults.handoff.host:
        changes["handoff"] = {"host": address}
    if mode is Mode.AGGREGATED:
        changes["router"] = {"disaggregation": "never"}
    groups = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return config.model_copy(update=groups)


def _token_file(config: KelpConfig, run_folder: Path) -> Path:
    """Of the user's token, which must be of use, or else of one that is the run's own."""
    given = config.peers.token_file
    if given is None:
        given = run_folder / "peer-token"
        make_token_file(given)
    read_secret(given)
    return given.resolve()


def _ready_text(options: ServeOptions, mode: Mode) -> str:
    base = f"http://{own_address(options.host)}:{options.http_port}"
    ports = f"HTTP {options.http_port}   gRPC {options.grpc_port}   metrics {options.metrics_port}"
    return f"""
kelp serves {options.config.model.path.name} ({mode.value}, {options.config.executor.dtype}) on {options.host}
  {ports}

  curl -s {base}/v2/models/llm/generate -d '{{"text_input": "The capital of France is", "max_tokens": 16}}'

Ctrl-C stops it."""


def serve_command(
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder or GGUF file (default: SmolLM2-135M-Instruct).")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Prefill and decode in separate workers, or together.")] = (
        Mode.DISAGGREGATED
    ),
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers (disaggregated).")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1,
    engine: Annotated[str | None, typer.Option(help="torch, or mock: plays a worker, computes nothing.")] = None,
    routers: Annotated[int | None, typer.Option(min=1, help="Router processes, which share the requests.")] = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="One tritonserver per worker, supervised.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32.")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks per worker; 0 sizes the pool itself.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="A LoRA adapter: name=PEFT folder; may be repeated.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless asked otherwise.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Triton's HTTP port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="Triton's gRPC port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Triton's metrics port.")] = 8002,
    config: ConfigFile = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any field: group.field=value.")] = None,
    startup_timeout_s: Annotated[float, typer.Option(help="How long models may take to load.")] = 180.0,
) -> None:
    """Serve a model through Triton until Ctrl-C or SIGTERM."""
    say = sayer()
    root, triton = repository_root(), find_triton()
    link_python_backend(triton, root / "backends")
    say(f"tritonserver: {triton.version}")
    folder = prepare_model(model, say)
    run_folder = serve.make_run_folder()
    num_prefill = prefill if mode is Mode.DISAGGREGATED else 0
    try:
        chosen = {
            "model.path": str(folder),
            "executor.engine": engine,
            "executor.dtype": dtype,
            "executor.num_blocks": None if num_blocks is None else str(num_blocks),
            "server.router_instances": None if routers is None else str(routers),
        }
        effective = effective_config(config, chosen, lora or [], settings or [])
        options = ServeOptions(
            config=_for_run(effective, mode, num_prefill + decode, run_folder, (host, grpc_port)),
            host=host,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            num_prefill=num_prefill,
            num_decode=decode,
            is_isolated=isolate,
            startup_timeout_s=startup_timeout_s,
        )
        preflight.check(options)
    except KelpError:
        serve.remove_run_folder(run_folder)
        raise
    environment = {**triton.environment(os.environ), "KELP_CONFIG": str(run_folder / "kelp.yaml")}
    launch = Launch(triton.binary, environment, root / "model_repository", root / "backends", run_folder)
    serve.Serving(options, launch, say).run(on_ready=lambda: print(_ready_text(options, mode), flush=True))
    serve.remove_run_folder(run_folder)


def supervise(
    grpc_port: GrpcPort = 8001,
    host: Annotated[str, typer.Option(help="Address of this host at which the server listens.")] = "127.0.0.1",
    config: ConfigFile = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any field: group.field=value.")] = None,
) -> None:
    """Load models of a running tritonserver again when their processes die; for servers without `kelp serve`."""
    rules = effective_config(config, {}, [], settings or []).supervision
    Supervision(f"{host}:{grpc_port}", rules, sayer()).run()


def scale(
    target: Annotated[str, typer.Argument(help="role=count, for example decode=2 or prefill=3.")],
    grpc_port: GrpcPort = 8001,
    host: Annotated[str, typer.Option(help="Host of the running server.")] = "127.0.0.1",
    drain_timeout_s: Annotated[float, typer.Option(help="How long running requests may take to end.")] = 60.0,
    version: Annotated[
        str | None, typer.Option(help="Workers of another version of the model, beside the server's own.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Where that version lies: a folder or a GGUF file.")] = None,
) -> None:
    """Start or drain and stop workers of a live server.

    Workers of another version get no requests before `kelp traffic` gives it a share.
    """
    role, _, count = target.partition("=")
    if role not in ("prefill", "decode") or not count.isdigit():
        raise ConfigError(f"{target!r}: must be prefill=<count> or decode=<count>")
    say = sayer()
    beside = _version_beside(version, model, say)
    fleet = Fleet(f"{host}:{grpc_port}", say)
    try:
        fleet.scale(role, int(count), drain_timeout_s, beside)
    finally:
        fleet.close()


def _version_beside(version: str | None, model: Path | None, say: Callable[[str], None]) -> VersionBeside | None:
    if version is None:
        if model is not None:
            raise ConfigError("--model: say with --version what it is to be called")
        return None
    if not re.fullmatch(VERSION_NAME, version):
        raise ConfigError(f"--version {version!r}: a letter, then up to 15 letters and digits, all lower case")
    return VersionBeside(version, None if model is None else prepare_model(model, say))


def drain(
    worker: Annotated[str, typer.Argument(help="Model name of the worker, for example decode_1.")],
    grpc_port: GrpcPort = 8001,
    host: Annotated[str, typer.Option(help="Host of the running server.")] = "127.0.0.1",
    timeout_s: Annotated[float, typer.Option(help="How long running requests may take to end.")] = 60.0,
) -> None:
    """Stop routing to a worker and wait until its requests have ended."""
    fleet = Fleet(f"{host}:{grpc_port}", sayer())
    try:
        status = fleet.drain(worker, timeout_s)
    finally:
        fleet.close()
    print(f"{worker}: {status.state}, {status.num_running + status.num_waiting} requests, {status.num_leases} leases")
