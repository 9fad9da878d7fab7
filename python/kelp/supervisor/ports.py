"""Ports: which are free, and who holds one that is not."""

from __future__ import annotations

import socket
from contextlib import closing

import psutil

from kelp.core.errors import ConfigError

_WILDCARDS = ("0.0.0.0", "::", "")


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


def pick_free(host: str) -> int:
    """A port nobody uses at this moment."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


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
