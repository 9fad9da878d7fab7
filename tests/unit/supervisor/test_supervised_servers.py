"""A server of `kelp serve` is looked after by itself: what takes long there keeps no other one waiting."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kelp.core.config_supervision import SupervisionConfig
from kelp.core.errors import ConfigError
from kelp.core.schema import LLM
from kelp.supervisor import supervised as supervised_module
from kelp.supervisor.server import TritonServer
from kelp.supervisor.stop_signals import StopRequested, StopSignals
from kelp.supervisor.supervised import Supervised
from support.waiting import wait_until

RULES = SupervisionConfig(first_backoff_s=0.001, longest_backoff_s=0.001)


class PlayedServer:
    """Takes the place of a `TritonServer`."""

    def __init__(self, ends_with_router: bool = False) -> None:
        self.spec = SimpleNamespace(name="kelp", grpc_endpoint="127.0.0.1:1", ends_with_router=ends_with_router)
        self.log_path = "kelp.log"
        self.pid = os.getpid()
        self.is_up = True
        self.does_come_up = True
        self.starters: list[threading.Thread] = []
        self.start_errors: list[Exception] = []

    def is_running(self) -> bool:
        return self.is_up

    def start(self) -> None:
        self.starters.append(threading.current_thread())
        if self.start_errors:
            raise self.start_errors.pop()
        self.is_up = True

    def stop(self) -> None:
        self.is_up = False

    kill = stop

    def wait_ready(self, _: float) -> None:
        if not self.does_come_up:
            raise ConfigError("no memory")


class PlayedWatch:
    """Takes the place of a `ModelWatch`; `check` blocks until it is let go."""

    made: list[PlayedWatch] = []

    def __init__(self, *arguments: Any) -> None:
        self.deal_with: Callable[[str], bool] = arguments[-1]
        self.go_on = threading.Event()
        self.num_checks = 0
        self.is_closed = False
        self.made.append(self)

    def check(self) -> None:
        self.num_checks += 1
        self.go_on.wait(30)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def watches(monkeypatch: pytest.MonkeyPatch) -> list[PlayedWatch]:
    PlayedWatch.made = []
    monkeypatch.setattr(supervised_module, "ModelWatch", PlayedWatch)
    return PlayedWatch.made


def made(server: PlayedServer, said: list[str]) -> Supervised:
    return Supervised(cast(TritonServer, server), RULES, said.append)


def test_a_look_that_takes_long_returns_at_once_and_is_not_begun_twice(watches: list[PlayedWatch]) -> None:
    supervised = made(PlayedServer(), [])
    for _ in range(3):
        supervised.watch(1.0, StopSignals())
    wait_until(lambda: len(watches) == 1 and watches[0].num_checks == 1)
    watches[0].go_on.set()
    wait_until(lambda: supervised.watch(1.0, StopSignals()) is None and watches[0].num_checks > 1)
    supervised.stop()
    assert watches[0].is_closed


def test_a_dead_server_is_started_by_the_caller_and_waited_for_elsewhere() -> None:
    server, said = PlayedServer(), list[str]()
    supervised = made(server, said)
    server.is_up = False
    wait_until(lambda: supervised.watch(1.0, StopSignals()) is None and "kelp is back" in said)
    assert server.starters == [threading.current_thread()]
    for watch in PlayedWatch.made:
        watch.go_on.set()
    supervised.stop()


def test_a_server_that_does_not_come_back_is_stopped_and_tried_again() -> None:
    server, said = PlayedServer(), list[str]()
    supervised = made(server, said)
    server.is_up, server.does_come_up = False, False
    wait_until(lambda: supervised.watch(1.0, StopSignals()) is None and len(server.starters) == 2)
    assert any("did not come back" in line and "no memory" in line for line in said)
    supervised.stop()


def test_a_server_for_which_the_system_has_no_process_is_tried_again_and_harms_nobody() -> None:
    server, said = PlayedServer(), list[str]()
    supervised = made(server, said)
    server.is_up = False
    server.start_errors = [BlockingIOError(errno.EAGAIN, "no process left"), subprocess.SubprocessError("preexec")]
    wait_until(lambda: supervised.watch(1.0, StopSignals()) is None and "kelp is back" in said)
    assert len(server.starters) == 3
    assert sum("cannot be started" in line for line in said) == 2
    for watch in PlayedWatch.made:
        watch.go_on.set()
    supervised.stop()


def test_a_signal_that_comes_while_a_server_cannot_be_started_still_stops_everything() -> None:
    server, signals = PlayedServer(), StopSignals()
    supervised = made(server, [])
    server.is_up = False

    def start() -> None:
        signals._on_signal()
        raise OSError("no process left")

    server.start = start  # type: ignore[method-assign]
    with pytest.raises(StopRequested):
        wait_until(lambda: supervised.watch(1.0, signals) is not None)
    supervised.stop()


def test_a_server_that_is_of_no_use_without_its_router_is_ended(watches: list[PlayedWatch]) -> None:
    server, said = PlayedServer(ends_with_router=True), list[str]()
    supervised = made(server, said)
    supervised.watch(1.0, StopSignals())
    wait_until(lambda: len(watches) == 1)
    assert watches[0].deal_with(LLM.name)
    assert not server.is_up
    assert not watches[0].deal_with("preprocess")
    watches[0].go_on.set()
    supervised.stop()
