"""A tritonserver and its stubs are found in the process table, the dead ones not among them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kelp.core.config_supervision import SupervisionConfig
from kelp.core.errors import ConfigError
from kelp.supervisor import supervise
from kelp.supervisor.stubs import find_server, is_live, live_stubs
from kelp.supervisor.supervise import Supervision
from support.serving import free_ports
from support.waiting import wait_until

STUBS = 'for name in decode_0_0 llm_0_0; do {stub} -c "sleep 60; :" shm $name /backend & done; wait'


class PlayedTriton:
    """Processes that look like a tritonserver with two stubs."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        stub, server = folder / "triton_python_backend_stub", folder / "tritonserver"
        for name in (stub, server):
            if not name.exists():
                name.symlink_to("/bin/sh")
        self.process = subprocess.Popen([str(server), "-c", STUBS.format(stub=stub), *arguments])
        self.server = psutil.Process(self.process.pid)
        wait_until(lambda: len(live_stubs(self.server)) == 2, "two stubs")

    def end(self) -> None:
        for process in [*self.server.children(recursive=True), self.server]:
            process.kill()
        self.process.wait()


@pytest.fixture
def port() -> int:
    (port,) = free_ports(1)
    return port


@pytest.fixture
def triton(tmp_path: Path, port: int) -> Iterator[PlayedTriton]:
    played = PlayedTriton(tmp_path, "--grpc-address=127.0.0.1", f"--grpc-port={port}")
    yield played
    if played.process.poll() is None:
        played.end()


def test_a_server_is_found_by_its_port_and_its_stubs_by_their_instances(triton: PlayedTriton, port: int) -> None:
    server = find_server(port)
    assert server is not None and server.pid == triton.server.pid
    assert set(live_stubs(server)) == {"decode_0_0", "llm_0_0"}


def test_a_stub_that_died_is_not_among_them_even_if_its_server_has_not_noticed(triton: PlayedTriton) -> None:
    stub = live_stubs(triton.server)["decode_0_0"]
    triton.server.suspend()
    stub.kill()
    wait_until(lambda: not is_live(stub), "its death")
    assert set(live_stubs(triton.server)) == {"llm_0_0"}
    triton.server.resume()


def test_the_port_may_stand_in_an_argument_of_its_own(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    played = PlayedTriton(tmp_path, "--grpc-port", str(port))
    try:
        server = find_server(port)
        assert server is not None and server.pid == played.server.pid
    finally:
        played.end()


def test_a_server_that_ended_has_no_stubs_and_is_not_found(triton: PlayedTriton, port: int) -> None:
    triton.end()
    assert find_server(port) is None
    assert live_stubs(triton.server) == {}


def test_two_servers_of_one_port_are_refused(triton: PlayedTriton, tmp_path: Path, port: int) -> None:
    second = PlayedTriton(tmp_path, f"--grpc-port={port}")
    try:
        with pytest.raises(ConfigError, match=f"--grpc-port: {port} .* several"):
            find_server(port)
    finally:
        second.end()


class NoWatch:
    """Takes the place of `ModelWatch`."""

    num_open = 0

    def __init__(self, server: psutil.Process, *_: object) -> None:
        self.server = server
        self.num_checks = 0
        type(self).num_open += 1

    def check(self) -> None:
        self.num_checks += 1

    def close(self) -> None:
        type(self).num_open -= 1


def test_supervision_waits_for_a_server_and_for_the_next_one_when_that_has_ended(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "ModelWatch", NoWatch)
    said: list[str] = []
    supervision = Supervision(f"127.0.0.1:{port}", SupervisionConfig(), said.append)
    for _ in range(2):
        supervision.step()
        supervision.step()
        played = PlayedTriton(tmp_path, f"--grpc-port={port}")
        try:
            supervision.step()
            assert NoWatch.num_open == 1
        finally:
            played.end()
    supervision.step()
    assert NoWatch.num_open == 0
    heads = ["no tritonserver", "found the tritonserver", "the tritonserver at"]
    assert [line.startswith(head) for line, head in zip(said, heads * 2, strict=False)] == [True] * 6
