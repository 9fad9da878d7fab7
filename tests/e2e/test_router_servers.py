"""Two tritonservers with an `llm` each, before the same mock workers: they share what they know, and no fate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mock_fleet_rig import Reference, explain, generate, model_of, samples

from kelp.core.config import CONFIG_ENV
from kelp.supervisor.plan import MODELS_BESIDE_WORKERS, ServerSpec
from kelp.supervisor.server import Launch, TritonServer
from kelp.supervisor.triton import find_triton
from support.llm_client import Answer, Call
from support.serving import HOST, KelpServer, clean_environment, free_ports
from support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
LONG = 400
_START_S = 120.0


class SecondServer:
    """A tritonserver of its own with `llm` and `preprocess`, in the run of another one: same registry, same workers."""

    def __init__(self, first: KelpServer) -> None:
        grpc_port, http_port, self.metrics_port = free_ports(3)
        spec = ServerSpec("kelp-second", HOST, grpc_port, http_port, self.metrics_port, MODELS_BESIDE_WORKERS)
        self.grpc_endpoint, self.http_url = spec.grpc_endpoint, f"http://{HOST}:{http_port}"
        triton, config = find_triton(), first.run_folder / "kelp.yaml"
        environment = {**triton.environment(clean_environment()), CONFIG_ENV: str(config)}
        launch = Launch(triton.binary, environment, ROOT / "model_repository", ROOT / "backends", first.run_folder)
        self._server = TritonServer(launch, spec)

    def start(self) -> None:
        self._server.start()
        self._server.wait_ready(_START_S)

    def kill(self) -> None:
        """The server and its stubs, at once."""
        port = f"--grpc-port={self.grpc_endpoint.rpartition(':')[2]}"
        (server,) = (child for child in psutil.Process().children() if port in child.cmdline())
        for process in (server, *server.children(recursive=True)):
            process.kill()

    def stop(self) -> None:
        self._server.stop()


Server = KelpServer | SecondServer


@pytest.fixture(scope="module")
def first() -> Iterator[KelpServer]:
    arguments = ("--engine", "mock", "--decode", "2")
    settings: dict[str, object] = {"handoff.transport": "local", "kv_manager.enabled": False}
    with KelpServer("aggregated", settings=settings, arguments=arguments).start() as server:
        yield server


@pytest.fixture(scope="module")
def second(first: KelpServer) -> Iterator[SecondServer]:
    server = SecondServer(first)
    try:
        server.start()
        for each in (first, server):
            wait_until(lambda each=each: num_known(each) == 1, "the routers to know each other")  # type: ignore[misc]
        yield server
    finally:
        server.stop()


def num_known(server: Server) -> float:
    found = samples(server)["kelp_routers_known"]  # type: ignore[arg-type]
    return sum(sample.value for sample in found)


def streams(server: Server, name: str, count: int, **fields: object) -> dict[str, Call]:
    """Streams under way: each has had its first response."""
    calls = {}
    for number in range(count):
        text = f"{name}-{number}"
        request = {"text_input": text, "max_tokens": LONG, "stream": True, **fields}
        calls[text] = Call(server.grpc_endpoint, request, request_id=text)
    return calls


def test_each_counts_what_the_other_has_under_way(first: KelpServer, second: SecondServer) -> None:
    calls = streams(first, "counted", 4)
    began = {name: call.next() for name, call in calls.items()}

    def num_seen() -> float:
        generate(second, text_input="look", max_tokens=1, id="look")  # type: ignore[arg-type]
        seen = explain(second, "look")  # type: ignore[arg-type]
        assert seen["router_id"].startswith(second.grpc_endpoint)
        # Heartbeats tell of requests, but not of what they do: this is known from the other router alone.
        return float(sum(worker["num_decoding"] for worker in seen["choices"][0]["candidates"]))

    wait_until(lambda: num_seen() >= len(calls), "the other's requests to be counted")
    for name, call in calls.items():
        with call:
            assert Answer([began[name], *call]).token_ids == Reference().answer(name, LONG)
    wait_until(lambda: num_seen() == 0, "their end to be known")


def test_a_decision_is_explained_by_the_server_that_did_not_make_it(first: KelpServer, second: SecondServer) -> None:
    for here, there, name in ((first, second, "of-first"), (second, first, "of-second")):
        answer = generate(here, text_input=name, id=name)  # type: ignore[arg-type]
        explanation = explain(there, name)  # type: ignore[arg-type]
        assert explanation["router_id"].startswith(here.grpc_endpoint)
        assert model_of(explanation["choices"][0]["chosen"]) == model_of(answer["worker_ids"])


def test_a_killed_server_takes_none_of_the_others_requests_along(first: KelpServer, second: SecondServer) -> None:
    staying, lost = streams(first, "staying", 6), streams(second, "lost", 6)
    began = {name: call.next() for name, call in (staying | lost).items()}
    second.kill()
    for name, call in staying.items():
        with call:
            assert Answer([began[name], *call]).token_ids == Reference().answer(name, LONG)
    wait_until(lambda: num_known(first) == 0, "the dead router to be forgotten", 20.0)
    first.wait_quiet()
    for number in range(8):
        text = f"after-{number}"
        assert generate(first, text_input=text, max_tokens=16)["output_ids"] == Reference().answer(text, 16)
    for call in lost.values():
        call.cancel()
