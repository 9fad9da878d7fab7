"""The nixl wheel: finding it, the environment it needs, its errors as ours.

Everything that holds for every backend is handled here (docs/architecture.md, "Transport"):

- UCX's EFA module crashes every process at exit on hosts without EFA; it is disabled before the import.
- The progress thread would poll without pause; it is made to wait for events (docs/decisions/0005).
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kelp.core.errors import ConfigError, FatalTransferError, KelpError, ProtocolError, RetryableTransferError

_META_PACKAGE, _WHEELS = "nixl", ("nixl_cu12", "nixl_cu13")
_INFINIBAND = Path("/sys/class/infiniband")
_ENVIRONMENT = {
    "NIXL_LOG_LEVEL": "WARN",
    "UCX_LOG_LEVEL": "error",
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
}
"""Set where the operator has not; without the last one UCX's registration cache grows without bound."""

_PROGRESS_DELAY_US = 100_000
_making_agent = threading.Lock()
_PROTOCOL_ERRORS = ("nixlNotFoundError", "nixlInvalidParamError", "nixlMismatchError", "nixlNotAllowedError")


def _has_efa() -> bool:
    return any(driver.resolve().name == "efa" for driver in _INFINIBAND.glob("*/device/driver"))


def import_nixl(field: str = "handoff.transport") -> Any:
    """NIXL's Python API, with the environment set that it needs.

    Args:
        field: Of the configuration, what asks for it.

    Raises:
        ConfigError: No wheel is installed; names `field`.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not _has_efa():
        os.environ.setdefault("UCX_MODULES", "^efa")
    # The meta package wants torch's CUDA version and imports a CPU-only torch to ask it: 3 s and 200 MB. In a process
    # without torch any wheel does, because no accelerator's memory is registered there.
    packages = (_META_PACKAGE, *_WHEELS) if "torch" in sys.modules else (*_WHEELS, _META_PACKAGE)
    reasons = []
    for package in packages:
        try:
            return importlib.import_module(f"{package}._api")
        except ImportError as error:
            reasons.append(f"{package}: {error}")
    raise ConfigError(f"{field}: nixl needs its wheel: pip install 'kelp[nixl]' ({'; '.join(reasons)})")


@dataclass(frozen=True)
class _Overlay:
    """A module with some names replaced."""

    module: Any
    replaced: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.replaced[name] if name in self.replaced else getattr(self.module, name)


@contextmanager
def sleeping_progress_thread(api: Any) -> Iterator[None]:
    """Agents made inside wait for events instead of polling.

    The Python API fixes the progress thread's `pthrDelay` at 0: it polls without pause and takes most of a core per
    idle agent. With a delay it sleeps on UCX's event descriptors, and the delay is only an upper bound. One agent at a
    time is made like this: it works by exchanging a name of NIXL's module.
    """
    module: Any = sys.modules[api.nixl_agent.__module__]

    with _making_agent:
        bindings = module.nixlBind

        def set_field(config: Any, name: str, value: Any) -> None:
            bindings.nixlAgentConfig.__setattr__(config, name, _PROGRESS_DELAY_US if name == "pthrDelay" else value)

        event_driven = type("EventDrivenConfig", (bindings.nixlAgentConfig,), {"__setattr__": set_field})
        module.nixlBind = _Overlay(bindings, {"nixlAgentConfig": event_driven})
        try:
            yield
        finally:
            module.nixlBind = bindings


def typed_error(error: Exception, what: str) -> KelpError:
    """One of NIXL's errors (`error_types`) as ours; `what` says what was tried."""
    kind = type(error).__name__
    if kind == "nixlRemoteDisconnectError":
        return FatalTransferError(f"{what}: the peer is gone ({error})")
    if kind in _PROTOCOL_ERRORS or isinstance(error, ValueError):
        return ProtocolError(f"{what}: {kind}: {error}")
    return RetryableTransferError(f"{what}: {kind}: {error}")


def memory_type(device: str) -> str:
    """NIXL's name for the memory of a device."""
    return "DRAM" if device == "cpu" else "VRAM"


def error_types(api: Any) -> tuple[type[Exception], ...]:
    """All errors that the library raises."""
    bindings = vars(api.nixlBind)
    names = [name for name in bindings if name.startswith("nixl") and name.endswith("Error")]
    return tuple(bindings[name] for name in names)
