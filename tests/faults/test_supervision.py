"""Dead models are loaded again by `kelp supervise`, which may die itself; bad requests and bad workers are told apart.

The tests of this file share one server of mock workers, none of which `kelp serve` looks after.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fault_scenes import require_server

from kelp.registry.directory import RouterDirectory
from support.llm_client import Answer, ServedError, http_get, http_post
from support.serving import CLI, HOST, KelpServer, clean_environment, new_log
from support.waiting import wait_until

FATAL_TOKEN = 7777
HANG_TOKEN = 8888
BREAKING_TOKEN = 9999
HANG_S = 12.0
LONG = 300
EXPIRY_S = 3.0
BACK_S = 90.0
SETTINGS: dict[str, object] = {
    "kv_manager.enabled": False,
    "mock.fatal_token_id": FATAL_TOKEN,
    "mock.hang_token_id": HANG_TOKEN,
    "mock.hang_s": HANG_S,
    "mock.breaking_token_id": BREAKING_TOKEN,
    "watchdog.step_timeout_s": HANG_S / 3,
    "registry.heartbeat_s": 0.5,
    "registry.expiry_s": EXPIRY_S,
    "router.suspect_wait_s": 30.0,
    "supervision.enabled": False,
}


class Supervisor:
    """A `kelp supervise` beside a server; `start` and `kill` as often as wanted."""

    def __init__(self, grpc_port: int) -> None:
        self._command = [
            str(CLI),
            "supervise",
            "--grpc-port",
            str(grpc_port),
            "--set",
            "supervision.first_backoff_s=0.1",
        ]
        self._log = new_log("kelp-supervise-")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=clean_environment()
            )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and nothing else ends."""
        assert self._process is not None
        self._process.terminate()
        assert self._process.wait(30.0) == 0, self.said
        assert "the server serves on" in self.said
        self._log.unlink()

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")


@pytest.fixture(scope="module")
def fleet() -> Iterator[KelpServer]:
    require_server()
    arguments = ("--engine", "mock", "--decode", "3")
    with KelpServer("aggregated", settings=SETTINGS, arguments=arguments).start() as server:
        yield server


@pytest.fixture(scope="module")
def supervisor(fleet: KelpServer) -> Iterator[Supervisor]:
    supervisor = Supervisor(fleet.grpc_port)
    supervisor.start()
    yield supervisor
    supervisor.stop()


def epochs(server: KelpServer) -> dict[str, str]:
    return {name: record.epoch for name, record in server.records().items()}


def restarts(server: KelpServer) -> dict[str, float]:
    """How often each model was loaded again, as its metric says."""
    _, body = http_get(f"http://{HOST}:{server.metrics_port}/metrics")
    found = re.findall(r'^kelp_model_restarts\{model="(\w+)"\} (\S+)$', body.decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def poison(server: KelpServer) -> ServedError:
    """What a request that kills its workers is told."""
    with pytest.raises(ServedError) as raised:
        server.ask(input_ids=np.array([5, FATAL_TOKEN, 9], dtype=np.int32), max_tokens=4)
    return raised.value


def test_a_poison_request_costs_two_workers_which_come_back_and_no_other_request(
    fleet: KelpServer, supervisor: Supervisor
) -> None:
    story = {"text_input": "Once upon a time", "max_tokens": LONG, "ignore_eos": True}
    expected, before = fleet.ask(**story).token_ids, epochs(fleet)
    assert len(before) == 3
    calls = [fleet.open(**story) for _ in range(6)]
    first = [call.next() for call in calls]
    refusal = poison(fleet)
    assert refusal.code == "POISON_REQUEST"
    for call, response in zip(calls, first, strict=True):
        with call:
            assert Answer([response, *call]).token_ids == expected
    killed = set(re.findall(r"/(decode(?:_\d)?)\b", refusal.message))
    assert len(killed) == 2
    wait_until(lambda: all(epochs(fleet).get(name) not in (None, before[name]) for name in killed), "both back", BACK_S)
    (untouched,) = before.keys() - killed
    assert epochs(fleet)[untouched] == before[untouched]
    wait_until(lambda: all(restarts(fleet).get(name) == 1 for name in killed), "the count of restarts", 30.0)
    fleet.wait_quiet()


def test_a_dead_router_is_loaded_again(fleet: KelpServer, supervisor: Supervisor) -> None:
    routers = RouterDirectory(fleet.registry_folder, EXPIRY_S)
    (before,) = routers.snapshot()
    fleet.stub("llm").kill()
    wait_until(lambda: any(router.epoch > before.epoch for router in routers.snapshot()), "another router", BACK_S)
    wait_until(lambda: "llm is back" in supervisor.said, "its success", BACK_S)
    assert len(fleet.ask(text_input="Hello", max_tokens=4).token_ids) == 4


def test_a_supervisor_that_was_killed_is_replaced_and_makes_good_what_it_missed(
    fleet: KelpServer, supervisor: Supervisor
) -> None:
    before = epochs(fleet)
    supervisor.kill()
    fleet.stub("decode_2").kill()
    wait_until(lambda: "decode_2" not in fleet.records(), "its record to expire", 30.0)
    assert len(fleet.ask(text_input="Hello", max_tokens=4).token_ids) == 4
    supervisor.start()
    wait_until(lambda: epochs(fleet).get("decode_2") not in (None, before["decode_2"]), "the worker", BACK_S)
    wait_until(lambda: supervisor.said.count("decode_2 is back") >= 1, "word of it", 30.0)


def test_a_worker_whose_engine_hangs_is_left_by_its_requests_and_serves_again_when_it_goes_on(
    fleet: KelpServer, supervisor: Supervisor
) -> None:
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(
            fleet.ask, input_ids=np.array([5, HANG_TOKEN, 9], dtype=np.int32), max_tokens=4, ignore_eos=True
        )
        wait_until(lambda: "stuck" in states(fleet), "a stuck worker", 60.0)
        assert len(fleet.ask(text_input="Hello", max_tokens=4, ignore_eos=True).token_ids) == 4
        # It hangs at every worker the first time; the first that goes on serves it.
        assert len(hanging.result(120.0).token_ids) == 4
    wait_until(lambda: states(fleet) == {"ready"}, "all going on", 60.0)


def test_a_worker_whose_engine_fails_at_every_step_is_found_out_and_replaced_and_costs_no_other_request(
    fleet: KelpServer, supervisor: Supervisor
) -> None:
    before = epochs(fleet)
    bad = {"input_ids": [5, BREAKING_TOKEN, 9], "max_tokens": 4, "kelp_worker": "decode_1"}
    status, body = http_post(f"{fleet.http_url}/v2/models/llm/generate", bad)
    assert status >= 400 and b"the device has faulted" in body
    while epochs(fleet).get("decode_1") == before["decode_1"]:
        assert len(fleet.ask(text_input="Hello", max_tokens=4, ignore_eos=True).token_ids) == 4
    wait_until(lambda: epochs(fleet).get("decode_1") not in (None, before["decode_1"]), "a new one", BACK_S)
    wait_until(lambda: states(fleet) == {"ready"}, "all ready", 60.0)
    after = epochs(fleet)
    assert {name for name in before if after[name] != before[name]} == {"decode_1"}


def states(server: KelpServer) -> set[str]:
    return {record.state.value for record in server.records().values()}
