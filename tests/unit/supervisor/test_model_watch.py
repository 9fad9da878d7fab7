"""Models whose process has died are loaded again, one at a time, with more and more patience."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kelp.core.config_supervision import SupervisionConfig
from kelp.core.errors import ConfigError, NotFound, WorkerLost
from kelp.supervisor import model_watch, remains, run_state
from kelp.supervisor.model_watch import ModelWatch

RULES = SupervisionConfig(look_s=2.0, first_backoff_s=1.0, longest_backoff_s=4.0, healthy_after_s=60.0)


class PlayedGap:
    """Notes how many routers are followed, and -1 when the gap has ended."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def follow(self, routers: list[object]) -> None:
        if self.seen[-1:] != [len(routers)]:
            self.seen.append(len(routers))

    def end(self) -> None:
        self.seen.append(-1)

    def close(self) -> None:
        self.seen.append(-2)


class PlayedServer:
    """A tritonserver with its stubs; takes the place of `TritonControl` and of the process table."""

    def __init__(self) -> None:
        self.configs: dict[str, dict[str, Any]] = {}
        self.stubs: dict[str, SimpleNamespace] = {}
        self.loads: list[tuple[float, str, str]] = []
        self.freed: list[str] = []
        self.gap = PlayedGap()
        self.num_listings = 0
        self.load_error: Exception | None = None
        self.is_reachable = True
        self.now_s = 1000.0

    def add(self, name: str, count: int = 1, backend: str = "kelp_decode") -> None:
        group = {"name": f"{name}_0", "count": count}
        self.configs[name] = {"name": name, "backend": backend, "instance_group": [group], "input": ["kept"]}
        self.start(name)

    def start(self, name: str) -> None:
        (group,) = self.configs[name]["instance_group"]
        for index in range(group["count"]):
            born_s = self.now_s
            stub = SimpleNamespace(is_live=True, is_buried=False, create_time=lambda born_s=born_s: born_s)
            self.stubs[f"{group['name']}_{index}"] = stub

    def kill(self, instance: str) -> None:
        self.stubs[instance].is_live = False

    def ready_models(self) -> set[str]:
        self.num_listings += 1
        if not self.is_reachable:
            raise WorkerLost("nobody there")
        return set(self.configs)

    def config_of(self, name: str) -> dict[str, Any]:
        if name not in self.configs:
            raise NotFound(name)
        return self.configs[name]

    def load(self, name: str, config: dict[str, Any]) -> None:
        assert config["input"] == ["kept"]
        self.loads.append((self.now_s, name, config["parameters"]["epoch"]["string_value"]))
        if self.load_error is not None:
            raise self.load_error
        self.configs[name] = config
        self.start(name)

    def close(self) -> None:
        pass

    def monotonic(self) -> float:
        return self.now_s

    def live_stubs(self, _: object) -> dict[str, SimpleNamespace]:
        return {name: stub for name, stub in self.stubs.items() if stub.is_live}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PlayedServer:
    played = PlayedServer()
    monkeypatch.setattr(model_watch, "TritonControl", lambda _: played)
    monkeypatch.setattr(model_watch, "live_stubs", played.live_stubs)
    monkeypatch.setattr(model_watch, "is_live", lambda stub: stub.is_live)
    monkeypatch.setattr(remains, "is_unburied", lambda stub: not stub.is_live and not stub.is_buried)
    monkeypatch.setattr(model_watch, "free_streams", lambda name, *_: played.freed.append(name))
    monkeypatch.setattr(model_watch, "RouterGap", lambda *_: played.gap)
    monkeypatch.setattr(model_watch, "time", played)
    monkeypatch.setattr(run_state, "user_folder", lambda: tmp_path)
    for name in ("prefill", "decode", "llm"):
        played.add(name)
    return played


class Shift:
    """A watch that looks twice a second, and what it says."""

    def __init__(self, server: PlayedServer, **more: Any) -> None:
        self._server = server
        self.said: list[str] = []
        self.watch = ModelWatch(SimpleNamespace(), "host:8001", RULES, self.said.append, **more)  # type: ignore[arg-type]

    def run(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.5)):
            self.watch.check()
            self._server.now_s += 0.5


@pytest.fixture
def shift(server: PlayedServer) -> Iterator[Shift]:
    shift = Shift(server)
    yield shift
    shift.watch.close()


def test_a_model_whose_process_died_is_loaded_again_with_its_own_configuration(
    server: PlayedServer, shift: Shift
) -> None:
    shift.run(3.0)
    assert shift.said == [] and server.loads == []
    server.kill("llm_0_0")
    shift.run(3.0)
    assert [load[1:] for load in server.loads] == [("llm", "1")]
    assert [line.partition(" (")[0] for line in shift.said] == ["llm died; loading it again in 1 s", "llm is back"]


def test_a_model_that_keeps_dying_is_loaded_ever_more_seldom_and_numbered_on(
    server: PlayedServer, shift: Shift
) -> None:
    for _ in range(60):
        shift.run(0.5)
        for stub in (name for name in server.live_stubs(None) if name.startswith("decode")):
            server.kill(stub)
    times = [at_s for at_s, _, _ in server.loads]
    waits = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert waits[:2] == sorted(waits[:2]) and set(waits[2:]) == {max(waits)}
    assert RULES.longest_backoff_s <= max(waits) <= RULES.longest_backoff_s + 1.5
    assert [number for _, _, number in server.loads] == [str(number + 1) for number in range(len(times))]


@pytest.mark.parametrize("name", ["llm", "decode"])
def test_what_streams_of_a_process_that_was_replaced_and_died_is_told_once(
    server: PlayedServer, shift: Shift, name: str
) -> None:
    shift.run(3.0)
    former = server.stubs[f"{name}_0_0"]
    server.start(name)
    shift.run(3.0)
    assert server.freed == []
    former.is_live = False
    shift.run(6.0)
    assert (server.freed, server.loads, shift.said) == ([name], [], [])


def test_a_process_that_died_and_was_replaced_at_once_leaves_streams_too(server: PlayedServer, shift: Shift) -> None:
    shift.run(3.0)
    server.kill("llm_0_0")
    shift.run(0.5)
    server.start("llm")
    shift.run(6.0)
    assert (server.freed, server.loads) == (["llm"], [])


def test_a_process_that_was_replaced_and_has_finished_leaves_nothing(server: PlayedServer, shift: Shift) -> None:
    shift.run(3.0)
    former = server.stubs["llm_0_0"]
    server.start("llm")
    shift.run(3.0)
    former.is_live, former.is_buried = False, True
    shift.run(6.0)
    assert (server.freed, server.loads) == ([], [])


def test_a_death_that_is_dealt_with_is_none_of_a_former_process(server: PlayedServer, shift: Shift) -> None:
    shift.run(3.0)
    server.kill("llm_0_0")
    shift.run(12.0)
    assert ([load[1] for load in server.loads], server.freed) == (["llm"], ["llm"]), "freed once, when it is back"


def test_after_healthy_times_a_death_is_forgiven(server: PlayedServer, shift: Shift) -> None:
    for _ in range(3):
        server.kill("decode_0_0")
        shift.run(8.0)
    shift.run(RULES.healthy_after_s)
    server.kill("decode_0_0")
    shift.run(1.0)
    assert shift.said[-1] == "decode died; loading it again in 1 s"


def test_a_load_that_fails_is_tried_again_with_another_number(server: PlayedServer, shift: Shift) -> None:
    server.load_error = ConfigError("load failed: no such field\n\nAt:\n  a file")
    server.kill("decode_0_0")
    shift.run(4.0)
    assert "decode did not come back: load failed: no such field" in shift.said
    server.load_error = None
    shift.run(6.0)
    assert [number for _, _, number in server.loads] == [str(number + 1) for number in range(len(server.loads))]
    assert shift.said[-1].startswith("decode is back")


def test_several_dead_models_come_back_one_after_the_other(server: PlayedServer, shift: Shift) -> None:
    server.kill("decode_0_0")
    server.kill("prefill_0_0")
    shift.run(6.0)
    assert sorted(name for _, name, _ in server.loads) == ["decode", "prefill"]
    assert server.loads[0][0] < server.loads[1][0]


def test_one_dead_instance_of_several_is_enough(server: PlayedServer, shift: Shift) -> None:
    server.add("routers", count=3)
    shift.run(3.0)
    server.kill("routers_0_1")
    shift.run(3.0)
    assert [name for _, name, _ in server.loads] == ["routers"]


def test_an_older_process_that_finishes_its_requests_does_not_stand_for_a_dead_one(
    server: PlayedServer, shift: Shift
) -> None:
    older = server.stubs["llm_0_0"]
    shift.run(3.0)
    server.start("llm")
    shift.run(3.0)
    server.stubs["llm_0_0"] = older
    shift.run(5.0)
    assert [name for _, name, _ in server.loads] == ["llm"]


def test_a_death_that_is_dealt_with_otherwise_leads_to_no_load(server: PlayedServer) -> None:
    shift = Shift(server, deal_with=lambda name: name == "llm")
    shift.run(3.0)
    for name in ("llm", "decode"):
        server.kill(f"{name}_0_0")
    shift.run(6.0)
    assert {name for _, name, _ in server.loads} == {"decode"}
    shift.watch.close()


def test_a_model_that_was_unloaded_stays_so(server: PlayedServer, shift: Shift) -> None:
    shift.run(3.0)
    server.kill("decode_0_0")
    del server.configs["decode"]
    shift.run(6.0)
    assert server.loads == [] and shift.said == []


def test_a_dead_model_that_is_unloaded_before_its_turn_is_left_alone(server: PlayedServer, shift: Shift) -> None:
    server.kill("decode_0_0")
    shift.run(1.0)
    del server.configs["decode"]
    shift.run(6.0)
    assert server.loads == []


def test_models_of_other_backends_are_nobodys_business_here(server: PlayedServer, shift: Shift) -> None:
    server.add("theirs", backend="python")
    server.kill("theirs_0_0")
    shift.run(6.0)
    assert server.loads == []


def test_a_death_before_the_watch_began_is_found(server: PlayedServer, shift: Shift) -> None:
    server.kill("prefill_0_0")
    shift.run(3.0)
    assert [name for _, name, _ in server.loads] == ["prefill"]


def test_numbers_go_on_where_another_supervisor_left_off(server: PlayedServer, shift: Shift) -> None:
    server.configs["decode"]["parameters"] = {"epoch": {"string_value": "7"}, "model.path": {"string_value": "/m"}}
    server.kill("decode_0_0")
    shift.run(3.0)
    assert server.configs["decode"]["parameters"] == {
        "epoch": {"string_value": "8"}, "model.path": {"string_value": "/m"}
    }  # fmt: skip


def test_a_server_that_does_not_answer_is_asked_again(server: PlayedServer, shift: Shift) -> None:
    server.kill("decode_0_0")
    server.is_reachable = False
    shift.run(3.0)
    assert server.loads == []
    server.is_reachable = True
    shift.run(5.0)
    assert [name for _, name, _ in server.loads] == ["decode"]


def test_while_nothing_dies_the_server_is_asked_at_every_look_only(server: PlayedServer, shift: Shift) -> None:
    shift.run(20.0)
    assert server.num_listings == 10


def test_of_two_supervisors_one_stands_by_until_the_other_has_gone(server: PlayedServer, shift: Shift) -> None:
    shift.run(1.0)
    second = Shift(server)
    server.kill("decode_0_0")
    second.run(5.0)
    assert server.loads == []
    assert second.said == ["another supervisor has this server; standing by"]
    shift.watch.close()
    second.run(5.0)
    assert [name for _, name, _ in server.loads] == ["decode"]
    assert second.said[1] == "supervising"
    second.watch.close()
    assert list(run_state.user_folder().glob("supervisor-*")) == []


def test_what_was_asked_of_a_dead_model_meanwhile_is_freed_when_it_is_back(server: PlayedServer, shift: Shift) -> None:
    shift.run(3.0)
    server.kill("llm_0_0")
    shift.run(1.0)
    assert server.freed == []
    shift.run(3.0)
    assert [name for _, name, _ in server.loads] == ["llm"]
    assert server.freed == ["llm"]


def test_nothing_is_freed_when_others_of_the_model_took_what_was_asked_meanwhile(
    server: PlayedServer, shift: Shift
) -> None:
    server.add("llm", count=2)
    shift.run(3.0)
    server.kill("llm_0_1")
    shift.run(4.0)
    assert [name for _, name, _ in server.loads] == ["llm"]
    assert server.freed == []


def test_the_gap_is_told_of_routers_that_live_and_when_one_has_been_loaded(server: PlayedServer, shift: Shift) -> None:
    shift.run(2.0)
    server.kill("llm_0_0")
    shift.run(6.0)
    assert server.gap.seen == [1, 0, -1, 1]
    server.kill("decode_0_0")
    shift.run(6.0)
    shift.watch.close()
    assert server.gap.seen == [1, 0, -1, 1, -2]
