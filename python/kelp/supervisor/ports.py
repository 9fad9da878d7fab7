"""Ports: which are free, and who holds one that is not."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

import psutil

from kelp.core.errors import ConfigError

_WILDCARDS = ("0.0.0.0", "::", "")
_OUTGOING_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _TOO_HIGH = 20000, 30000
"""Above most services' well-known ports, below Kubernetes' node ports (30000-32767)."""
_FEWEST = 1000
_MAX_TRIES = 1000


def own_address(host: str) -> str:
    """Where processes of this host reach a server that listens on `host`; loopback for a wildcard.

    What only kelp's own processes talk to binds it too, so that listening everywhere opens the public ports alone.
    """
    return "127.0.0.1" if host in _WILDCARDS else host


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class PortClaims:
    """Picks ports for servers that are about to start: no other process of kelp picks them before the block ends.

    A claim is an abstract Unix socket named like the port: it counts in one network namespace, as ports do, and ends
    with its process. Ports come from outside the range that the kernel takes for outgoing connections, so that none
    of those holds a server's port while the server starts, or starts again.
    """

    def __init__(self) -> None:
        self._rng = random.SystemRandom()
        self._held = ExitStack()

    def __enter__(self) -> PortClaims:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """The servers listen by now, or never will."""
        self._held.close()

    def pick(self, host: str) -> int:
        """A port that nobody uses or has claimed.

        Raises:
            ConfigError: None was found.
        """
        candidates = _not_outgoing()
        for _ in range(_MAX_TRIES):
            port = self._rng.choice(candidates)
            if self._claim(port) and is_free(host, port):
                return port
        raise ConfigError(f"no free port on {host} among {candidates[0]}-{candidates[-1]}: stop what listens there")

    def _claim(self, port: int) -> bool:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0kelp-port-{port}")
        except OSError:
            claim.close()
            return False
        self._held.enter_context(claim)
        return True


def pick_free(host: str) -> int:
    """A port that nobody uses at this moment; for several processes that start at once, see `PortClaims`."""
    with PortClaims() as claims:
        return claims.pick(host)


def _not_outgoing() -> range:
    wanted = range(_LOWEST, _TOO_HIGH)
    try:
        lowest, highest = map(int, _OUTGOING_RANGE.read_text().split())
    except (OSError, ValueError):
        return wanted
    below, above = range(_LOWEST, min(_TOO_HIGH, lowest)), range(max(_LOWEST, highest + 1), 1 << 16)
    best = max(below, above, key=len)
    return best if len(best) >= _FEWEST else wanted


def require_free(option: str, host: str, port: int) -> None:
    """Refuse a port in use.

    Raises:
        ConfigError: Names the option, the port and, where it can be seen, the process that holds it.
    """
    if not is_free(host, port):
        raise ConfigError(f"{option}: port {port} is in use{_holder(port)}; choose another with {option}")


def _holder(port: int) -> str:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return ""
    for connection in connections:
        if (
            connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr[1] == port
            and connection.pid
        ):
            return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
