"""`kelp doctor`: what this machine has and lacks."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kelp.core.config import load_config
from kelp.core.errors import KelpError
from kelp.core.peer_auth import load_token
from kelp.registry.access import open_registry
from kelp.supervisor.model import check_model_folder
from kelp.supervisor.triton import find_triton

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `detail` says what was found, or how to get it."""

    subject: str
    is_fine: bool
    detail: str


def examine(config_file: Path | None = None) -> Iterator[Finding]:
    """Look at everything that serving with this configuration needs."""
    yield _try("tritonserver", lambda: find_triton().version)
    yield _try("model", lambda: str(check_model_folder(load_config(path=config_file).model.path)))
    yield _try_token(config_file)
    yield _try_registry(config_file)
    for package in ("torch", "nixl", "tritonclient", "grpcio", "numpy"):
        yield _package(package)
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    yield Finding("C compiler", compiler is not None, compiler or "none: decoding on a CPU is slower; install gcc")
    memory = psutil.virtual_memory()
    yield Finding("memory", True, f"{memory.available >> 20} MiB of {memory.total >> 20} MiB free")
    shared = shutil.disk_usage("/dev/shm")
    yield Finding("/dev/shm", shared.free > 64 << 20, f"{shared.free >> 20} MiB free")


def _try(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, look())
    except KelpError as error:
        return Finding(subject, False, error.text)


def _try_token(config_file: Path | None) -> Finding:
    """Whether the deployment's processes know each other, and the file that they share is of use."""
    subject = "peers' token"
    try:
        config = load_config(path=config_file)
        if load_token(config.peers) is not None:
            return Finding(subject, True, str(config.peers.token_file))
    except KelpError as error:
        return Finding(subject, False, error.text)
    addresses = (config.server.host, config.handoff.host, config.events.host, config.replicas.host)
    is_local = all(address in _LOOPBACK for address in addresses)
    needed = "none; `kelp serve` makes one per run" if is_local else "none, and addresses beyond this host are used"
    return Finding(subject, is_local, f"{needed}; several hosts need the same peers.token_file (docs/security.md)")


def _try_registry(config_file: Path | None) -> Finding:
    """Whether the registry answers, and others find this host by what it says there."""
    subject = "registry"
    try:
        config = load_config(path=config_file)
        registry = config.registry
        num_workers = len(open_registry(registry, load_token(config.peers)).workers.snapshot())
    except (KelpError, OSError) as error:
        return Finding(subject, False, error.text if isinstance(error, KelpError) else str(error))
    if not registry.url:
        return Finding(subject, True, f"{registry.path}, {num_workers} workers")
    hosts = {
        "server.host": config.server.host,
        "handoff.host": config.handoff.host,
        "events.host": config.events.host,
        "replicas.host": config.replicas.host,
    }
    hidden = [name for name, host in hosts.items() if host in _LOOPBACK]
    advice = f"; other hosts need an address of this one in {', '.join(hidden)} (docs/resilience.md)" if hidden else ""
    return Finding(subject, not hidden, f"{registry.url}, {num_workers} workers{advice}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed; run `make setup`")
