"""Connections of another process's clients are ended; its children's are not."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from kelp.core.schema import LLM, PREPROCESS
from kelp.supervisor.connections import break_client_connections, has_clients
from kelp.supervisor.dead_router import free_streams

_SERVER = """
import socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
child = subprocess.Popen([sys.executable, "-c", (
    "import socket; s = socket.create_connection(('127.0.0.1', %d)); print(s.recv(1), flush=True)" % port
)], stdout=sys.stdout)
own, _ = listener.accept()
print(port, flush=True)
client, _ = listener.accept()
print("connected", flush=True)
client.recv(1)
print("gone", flush=True)
own.sendall(b"x")
child.wait()
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def _line(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    return server.stdout.readline().strip()


def test_a_client_hears_at_once_that_its_connection_has_broken_and_a_model_keeps_its_own(
    server: subprocess.Popen[str],
) -> None:
    with socket.create_connection(("127.0.0.1", int(_line(server))), timeout=30) as client:
        assert _line(server) == "connected"
        assert break_client_connections(psutil.Process(server.pid)) == 1
        assert client.recv(1) == b""
    assert [_line(server), _line(server)] == ["gone", "b'x'"]


def test_connections_of_models_and_our_own_are_not_those_of_clients(server: subprocess.Popen[str]) -> None:
    with socket.create_connection(("127.0.0.1", int(_line(server))), timeout=30):
        assert _line(server) == "connected"
        assert not has_clients(psutil.Process(server.pid))


def test_a_connection_of_another_process_is_that_of_a_client(server: subprocess.Popen[str]) -> None:
    dial = f"import socket; s = socket.create_connection(('127.0.0.1', {_line(server)})); input()"
    with subprocess.Popen([sys.executable, "-c", dial], stdin=subprocess.PIPE) as client:
        assert _line(server) == "connected"
        assert has_clients(psutil.Process(server.pid))
        client.kill()


def test_only_the_death_of_the_router_breaks_connections(server: subprocess.Popen[str]) -> None:
    said: list[str] = []
    process = psutil.Process(server.pid)
    with socket.create_connection(("127.0.0.1", int(_line(server))), timeout=30) as client:
        assert _line(server) == "connected"
        assert not free_streams(PREPROCESS.name, process, said.append)
        assert said == []
        assert not free_streams(LLM.name, process, said.append)
        assert client.recv(1) == b""
    assert said == ["llm died, and its streams would wait for ever: 1 connections of clients broken"]


def test_a_server_that_has_ended_is_told_of(server: subprocess.Popen[str]) -> None:
    said: list[str] = []
    process = psutil.Process(server.pid)
    server.kill()
    server.wait()
    assert not free_streams(LLM.name, process, said.append)
    assert len(said) == 1
    assert "may wait for ever" in said[0]
