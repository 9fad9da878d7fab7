"""The end of a public server: no new requests, what runs may end, and nobody waits where nothing does."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from kelp.core.clock import FakeClock
from kelp.core.errors import WorkerLost
from kelp.supervisor.farewell import Farewell, FarewellParts

HEARTBEAT_S = 1.0
GRACE_S = 30.0


class PlayedServer:
    """A server whose requests end at given times; takes the place of a `TritonControl`, too."""

    def __init__(self, ends_s: float = 0.0) -> None:
        self.clock = FakeClock()
        self.start_s = self.clock.monotonic_s()
        self.ends_s = ends_s
        self.client_goes_s = self.records_idle_s = self.records_end_s = float("inf")
        self.is_loaded = True
        self.is_gone = False
        self.loads_again_s = float("inf")
        self.unloaded: list[str] = []
        self.told: list[float] = []

    @property
    def now_s(self) -> float:
        return self.clock.monotonic_s() - self.start_s

    def states(self) -> dict[str, str]:
        if self.is_gone:
            raise WorkerLost("no answer")
        if self.now_s >= self.loads_again_s:
            self.is_loaded, self.loads_again_s = True, float("inf")
        return {"llm": "READY" if self.is_loaded else "UNLOADING"}

    def unload(self, name: str) -> None:
        self.is_loaded = False
        self.unloaded.append(name)

    def records(self) -> list[Any]:
        is_idle = self.now_s >= min(self.ends_s, self.records_idle_s)
        renewed_ns = int(min(self.now_s, self.records_end_s)) * 10**9
        load = {"num_running": 0 if is_idle else 1, "num_waiting": 0}
        return [SimpleNamespace(worker_id="decode", heartbeat_ns=renewed_ns, **load)]

    def take_leave(self, grace_s: float = GRACE_S, **changes: Any) -> bool:
        parts = FarewellParts(
            control=self,
            has_router=lambda: self.is_loaded or self.now_s < self.ends_s,
            has_clients=lambda: self.now_s < self.client_goes_s,
            workers=self.records,
            monotonic_s=self.clock.monotonic_s,
            sleep=self.clock.advance,
        )
        farewell = Farewell(dataclasses.replace(parts, **changes), HEARTBEAT_S)
        return farewell.wait(grace_s, lambda: self.told.append(self.now_s))


def test_what_runs_may_end_and_nothing_new_begins() -> None:
    server = PlayedServer(ends_s=7.0)
    assert server.take_leave()
    assert server.unloaded == ["llm"]
    assert 7.0 <= server.now_s < 7.5
    assert server.told == [0.0]


def test_nobody_waits_where_nothing_runs() -> None:
    server = PlayedServer()
    assert server.take_leave()
    assert server.now_s == 0.0
    assert server.told == []


def test_what_does_not_end_is_waited_for_as_long_as_was_configured() -> None:
    server = PlayedServer(ends_s=100.0)
    assert not server.take_leave(grace_s=3.0)
    assert 3.0 <= server.now_s < 3.5


def test_a_client_that_goes_is_not_waited_for() -> None:
    server = PlayedServer(ends_s=100.0)
    server.client_goes_s = 2.0
    assert server.take_leave()
    assert 2.0 <= server.now_s < 2.5


def test_a_model_that_triton_never_ends_is_left_once_no_worker_has_had_anything_to_do_for_a_while() -> None:
    server = PlayedServer(ends_s=100.0)
    server.records_idle_s = 1.0
    assert server.take_leave()
    assert 1.0 + 3 * HEARTBEAT_S < server.now_s < 10.0


def test_a_worker_that_renews_its_record_no_more_may_have_something_to_do() -> None:
    server = PlayedServer(ends_s=12.0)
    server.records_idle_s = server.records_end_s = 0.0
    assert server.take_leave()
    assert 12.0 <= server.now_s < 12.5


def test_a_registry_that_cannot_be_read_says_nothing_of_workers() -> None:
    def lost() -> list[Any]:
        raise OSError("no such folder")

    server = PlayedServer(ends_s=12.0)
    assert server.take_leave(workers=lost)
    assert 12.0 <= server.now_s < 12.5


def test_a_model_that_was_being_loaded_again_is_taken_out_again() -> None:
    server = PlayedServer(ends_s=7.0)
    server.loads_again_s = 3.0
    assert server.take_leave()
    assert server.unloaded == ["llm", "llm"]


def test_a_server_that_is_gone_has_nothing_that_runs() -> None:
    server = PlayedServer(ends_s=100.0)
    server.is_gone = True
    assert server.take_leave()
    assert server.now_s == 0.0
