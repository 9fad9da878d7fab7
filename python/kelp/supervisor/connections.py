"""The connections of a server's clients, seen and ended from outside, where the server itself never would.

A tritonserver (2.51) leaves the streams of a dead router open without a word, and ending the server would take the
workers of the compact layout along. A descriptor of its socket, got through `pidfd_getfd`, closes the connection for
both sides; the server takes it for a client that has gone. It knows no models.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from typing import Any

import psutil

_PIDFD_GETFD = 438
"""Number of the system call (Linux 5.6), the same on all architectures."""


def break_client_connections(server: psutil.Process, spared: Sequence[psutil.Process] = ()) -> int:
    """Shut down what clients have open to any port that a server listens at; its models' own connections stay.

    Args:
        server: Of this host.
        spared: Processes that keep theirs as well.

    Returns:
        How many there were.

    Raises:
        OSError: The kernel has no `pidfd_getfd`, or does not let us trace the process.
        psutil.Error: The process has ended, or is not ours.
    """
    clients, ports = _clients_of(server, [*server.children(), *spared])
    if not clients:
        return 0
    pidfd = os.pidfd_open(server.pid)
    try:
        return sum(_shut_down(pidfd, item.fd, ports) for item in clients)
    finally:
        os.close(pidfd)


def has_clients(server: psutil.Process) -> bool:
    """Whether anybody but its models and this process has a connection to a server; if it cannot be told, yes."""
    try:
        clients, _ = _clients_of(server, [*server.children(), psutil.Process()])
    except psutil.NoSuchProcess:
        return False
    except (OSError, psutil.Error):
        return True
    return bool(clients)


def _clients_of(server: psutil.Process, others: Sequence[psutil.Process]) -> tuple[list[Any], set[int]]:
    """Connections to a server but for those of `others`, and the ports that it listens at."""
    connections = [item for item in server.net_connections("tcp") if item.laddr]
    ports = {item.laddr.port for item in connections if item.status == psutil.CONN_LISTEN}
    own = {item.laddr for process in others for item in _connections_of(process) if item.laddr}
    clients = [
        item
        for item in connections
        if item.status == psutil.CONN_ESTABLISHED and item.laddr.port in ports and item.raddr not in own
    ]
    return clients, ports


def _connections_of(process: psutil.Process) -> list[Any]:
    try:
        return list(process.net_connections("tcp"))
    except psutil.Error:
        return []


def _shut_down(pidfd: int, fd: int, ports: set[int]) -> bool:
    """Shut down one; False where the number has come to stand for something else meanwhile."""
    copied = int(ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, fd, 0))
    if copied < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    with socket.socket(fileno=copied) as connection:
        try:
            if connection.getsockname()[1] not in ports:
                return False
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
    return True
