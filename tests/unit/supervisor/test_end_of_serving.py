"""How `kelp serve` ends: the first signal lets what runs end, another one stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kelp.core.config import KelpConfig
from kelp.supervisor import serve
from kelp.supervisor.plan import ServeOptions
from kelp.supervisor.server import Launch

OPTIONS = ServeOptions(
    config=KelpConfig(),
    host="127.0.0.1",
    http_port=8000,
    grpc_port=8001,
    metrics_port=8002,
    num_prefill=0,
    num_decode=1,
    is_isolated=True,
    startup_timeout_s=60.0,
)


class PlayedSupervised:
    """Takes the place of a `Supervised`; a server's first look is when the signal comes."""

    def __init__(self, events: list[str], grpc_port: int) -> None:
        self.events = events
        self.server = SimpleNamespace(spec=SimpleNamespace(name=f"server {grpc_port}", grpc_port=grpc_port))

    def watch(self, *_: Any) -> None:
        self.events.append("signal")
        signal.raise_signal(signal.SIGTERM)

    def stop(self) -> None:
        self.events.append(f"stop {self.server.spec.name}")


@pytest.fixture
def signals() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: Callable[[list[str]], None], is_up: bool = True
) -> list[str]:
    """What happens, in order; `leave` takes the place of `take_leave`."""
    events: list[str] = []
    serving = serve.Serving(OPTIONS, Launch(tmp_path, {}, tmp_path, tmp_path, tmp_path), events.append)

    def take_leave(server: Any, *_: Any) -> None:
        events.append(f"leave {server.spec.name}")
        leave(events)

    def start(_: Any) -> None:
        serving._servers += [PlayedSupervised(events, 9001), PlayedSupervised(events, OPTIONS.grpc_port)]  # type: ignore[list-item]
        if not is_up:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(serve, "take_leave", take_leave)
    monkeypatch.setattr(serve, "_WATCH_S", 0.0)
    monkeypatch.setattr(serve, "remove_arenas", lambda _: None)
    monkeypatch.setattr(serve.run_state, "write_state", lambda *_: None)
    monkeypatch.setattr(serve.run_state, "remove_state", lambda _: None)
    monkeypatch.setattr(serving, "_start_all", start)
    serving.run(lambda: None)
    return events


def stops(events: list[str]) -> set[str]:
    return {event for event in events if event.startswith("stop ")}


BOTH = {"stop server 9001", "stop server 8001"}


def test_the_public_server_takes_leave_before_anything_stops(
    signals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = run(tmp_path, monkeypatch, lambda _: None)
    assert events[:3] == ["signal", "stopping", "leave server 8001"]
    assert stops(events[3:]) == BOTH and len(events) == 5


def test_a_second_signal_ends_the_wait(signals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(events: list[str]) -> None:
        signal.raise_signal(signal.SIGINT)
        events.append("waited on")

    events = run(tmp_path, monkeypatch, wait)
    assert "stopping at once" in events and "waited on" not in events
    assert stops(events) == BOTH


def test_a_third_signal_changes_nothing(signals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(_: list[str]) -> None:
        signal.raise_signal(signal.SIGTERM)

    serving_stop = serve.Serving._stop_all

    def stop_all(serving: serve.Serving) -> None:
        signal.raise_signal(signal.SIGTERM)
        serving_stop(serving)

    monkeypatch.setattr(serve.Serving, "_stop_all", stop_all)
    assert stops(run(tmp_path, monkeypatch, wait)) == BOTH


def test_a_signal_during_the_start_stops_at_once(
    signals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = run(tmp_path, monkeypatch, lambda _: None, is_up=False)
    assert not any(event.startswith("leave") for event in events)
    assert stops(events) == BOTH
