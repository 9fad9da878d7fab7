"""While a router is dead, whoever asks for it hears so soon."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from kelp.supervisor import dead_router
from kelp.supervisor.dead_router import RouterGap
from support.waiting import wait_until

PERIOD_S = 0.05
_SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
clients = []
while True:
    clients.append(listener.accept()[0])
"""
_CLIENT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=30)
print("asked", flush=True)
print("over" if connection.recv(1) == b"" else "answered", flush=True)
"""


class PlayedTriton:
    """Answers for `TritonControl` whether the router's model is loaded."""

    def __init__(self) -> None:
        self.is_loaded = True
        self.num_asked = 0

    def is_model_ready(self, name: str) -> bool:
        assert name == "llm"
        self.num_asked += 1
        return self.is_loaded

    def close(self) -> None:
        pass


class Scene:
    """A server, a router and clients, each a process."""

    def __init__(self, gap: RouterGap, triton: PlayedTriton, port: int, router: subprocess.Popen[bytes]) -> None:
        self.gap = gap
        self.triton = triton
        self._port = port
        self.router = router
        gap.follow([psutil.Process(router.pid)])

    def ask(self) -> subprocess.Popen[str]:
        """A client that has connected."""
        command = [sys.executable, "-c", _CLIENT, str(self._port)]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None and client.stdout.readline() == "asked\n"
        return client

    def looks(self, count: int) -> None:
        """The gap has looked after the router so often again."""
        goal = self.triton.num_asked + count
        wait_until(lambda: self.triton.num_asked >= goal, "another look", 30.0)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    triton = PlayedTriton()
    monkeypatch.setattr(dead_router, "TritonControl", lambda _: triton)
    with (
        subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as router,
    ):
        assert server.stdout is not None
        gap = RouterGap(psutil.Process(server.pid), "host:8001", PERIOD_S)
        yield Scene(gap, triton, int(server.stdout.readline()), router)
        gap.close()
        server.kill()
        router.kill()


def ended(client: subprocess.Popen[str]) -> bool:
    return client.communicate(timeout=30)[0] == "over\n"


def test_whoever_asks_for_a_dead_router_is_cut_off_again_and_again(scene: Scene) -> None:
    waiting = scene.ask()
    scene.router.kill()
    assert ended(waiting)
    for _ in range(2):
        assert ended(scene.ask())


def test_nobody_is_cut_off_when_the_router_is_back(scene: Scene) -> None:
    scene.router.kill()
    assert ended(scene.ask())
    scene.gap.end()
    client = scene.ask()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as successor:
        scene.gap.follow([psutil.Process(successor.pid)])
        with pytest.raises(subprocess.TimeoutExpired):
            client.communicate(timeout=10 * PERIOD_S)
        successor.kill()
    assert ended(client)


def test_nobody_is_cut_off_from_a_server_whose_router_was_unloaded(scene: Scene) -> None:
    scene.triton.is_loaded = False
    client = scene.ask()
    scene.router.kill()
    scene.looks(5)
    assert client.poll() is None
    scene.triton.is_loaded = True
    assert ended(client)


def test_our_own_connections_are_spared(scene: Scene) -> None:
    with socket.create_connection(("127.0.0.1", scene._port), timeout=30) as own:
        scene.router.kill()
        assert ended(scene.ask())
        own.settimeout(10 * PERIOD_S)
        with pytest.raises(TimeoutError):
            own.recv(1)


def test_a_server_that_has_gone_is_no_failure(scene: Scene) -> None:
    scene.gap._server.kill()
    scene.router.kill()
    scene.looks(3)
