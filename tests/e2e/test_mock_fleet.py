"""Mock workers that hand KV over, behind three routers: right tokens on every path, and what a dead router leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from mock_fleet_rig import NUM_ROUTERS, Reference, explain, generate, kill_between_responses, model_of

from kelp.client.base import WorkerAddress
from kelp.client.grpc import GrpcWorkerClient
from kelp.core.messages import DrainCommand, WorkerStatus
from kelp.registry.directory import RouterDirectory
from support.llm_client import Answer, Call, ServedError, http_post, sse_events
from support.serving import KelpServer, run_cli
from support.waiting import wait_until

MAX_TOKENS = 24
LONG = 400
ENDLESS = 6000
STEP_S = 8e-3
MAX_TRIES = 12
PROMPTS = [
    f"Ship {number} left the harbour with {number * 7} barrels of " + "salt and " * number for number in range(24)
]
SETTINGS: dict[str, object] = {"router.disaggregation": "always", "supervision.enabled": False, "drain.grace_s": 0}
"""Every prompt is handed over; a dead router stays dead, to be looked at; a drained worker does not wait."""


@pytest.fixture(scope="module")
def fleet() -> Iterator[KelpServer]:
    arguments = ("--engine", "mock", "--decode", "2", "--routers", str(NUM_ROUTERS))
    server = KelpServer("disaggregated", settings=SETTINGS, arguments=arguments).start()
    try:
        yield server
    finally:
        # The last test kills a router, after which Triton does not end cleanly.
        server.kill()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def fields(prompt: str) -> dict[str, Any]:
    return {"text_input": prompt, "max_tokens": MAX_TOKENS}


def test_handed_over_prompts_are_answered_as_the_reference_says_and_nothing_stays_behind(
    fleet: KelpServer, reference: Reference
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: generate(fleet, **fields(prompt)), PROMPTS))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer["output_ids"] == reference.answer(prompt, MAX_TOKENS)
        prefill, decode = map(model_of, answer["worker_ids"])
        assert prefill == "prefill" and decode.startswith("decode")
    fleet.wait_quiet()


def test_a_stream_carries_the_same_tokens(fleet: KelpServer, reference: Reference) -> None:
    prompt = PROMPTS[3]
    status, body = http_post(f"{fleet.http_url}/v2/models/llm/generate_stream", {**fields(prompt), "stream": True})
    assert status == 200
    said: list[int] = []
    for event in sse_events(body):
        ids = event.get("output_ids", [])
        said += ids if isinstance(ids, list) else [ids]
    assert said == reference.answer(prompt, MAX_TOKENS)
    fleet.wait_quiet()


def drain(server: KelpServer, worker: str) -> None:
    async def obey() -> WorkerStatus:
        client, record = GrpcWorkerClient(server.peer_token), server.records()[worker]
        address = WorkerAddress(record.endpoint, record.model_name, epoch=record.epoch)
        try:
            return await client.control(address, DrainCommand())
        finally:
            await client.close()

    assert asyncio.run(obey()).state == "draining"


def unload(server: KelpServer, worker: str) -> None:
    status, _ = http_post(f"{server.http_url}/v2/repository/models/{worker}/unload", {})
    assert status == 200


def test_a_drained_decode_worker_takes_no_stream_along(fleet: KelpServer, reference: Reference) -> None:
    name = "before the drain"
    with long_stream(fleet, name, ENDLESS) as call:
        started_s, said = time.monotonic(), []
        while len(said) < 5:
            said += call.next().token_ids
        (worker,) = [each for each, status in fleet.statuses().items() if status.num_running and each != "prefill"]
        drain(fleet, worker)
        wait_until(lambda: explain(fleet, name)["attempt"] > 1, "a second attempt", 60.0)
        # More than one worker can have said by now.
        num_tokens = int((time.monotonic() - started_s) / STEP_S) + 50
        while len(said) < num_tokens:
            said += call.next().token_ids
        call.cancel()
    assert num_tokens < ENDLESS and said[:num_tokens] == reference.answer(name, num_tokens)
    unload(fleet, worker)
    wait_until(lambda: worker not in fleet.records(), "its record to go", 30.0)
    back = run_cli("scale", "decode=2", "--grpc-port", str(fleet.grpc_port))
    assert back.returncode == 0, back.stderr
    fleet.wait_quiet()


def test_a_killed_router_takes_only_its_own_requests_along(fleet: KelpServer, reference: Reference) -> None:
    streams = {f"stream-{number}": long_stream(fleet, f"stream-{number}") for number in range(9)}
    first = {name: call.next() for name, call in streams.items()}
    router_of = {name: explain(fleet, name)["router_id"] for name in streams}
    dead = router_of_stub(live_routers(fleet), "llm_0_0")
    assert set(router_of.values()) == live_routers(fleet)

    kill_between_responses(fleet, "llm", ("prefill", "decode", "decode_1"), [*streams.values()])
    for name, call in streams.items():
        if router_of[name] != dead:
            answer = Answer([first[name], *call])
            assert answer.token_ids == reference.answer(name, LONG)
    wait_until(lambda: live_routers(fleet) == set(router_of.values()) - {dead}, "its record to expire", 20.0)
    fleet.wait_quiet()

    for number in range(NUM_ROUTERS * 4):
        name = f"later-{number}"
        answer = asked_again(lambda name=name: generate(fleet, id=name, **fields(name)))
        assert answer["output_ids"] == reference.answer(name, MAX_TOKENS)
        assert asked_again(lambda name=name: explain(fleet, name))["router_id"] != dead
    for call in streams.values():
        call.cancel()


def long_stream(server: KelpServer, name: str, max_tokens: int = LONG) -> Call:
    request = {"text_input": name, "max_tokens": max_tokens, "stream": True}
    return Call(server.grpc_endpoint, request, request_id=name)


def live_routers(server: KelpServer) -> set[str]:
    return {record.router_id for record in RouterDirectory(server.registry_folder, 5.0).snapshot()}


def router_of_stub(router_ids: set[str], instance: str) -> str:
    found = [router_id for router_id in router_ids if model_of(router_id) == instance]
    assert len(found) == 1, router_ids
    return found[0]


def asked_again(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a client does: Triton hands some requests to the dead process, which fail at once and say so."""
    for _ in range(MAX_TRIES):
        try:
            return ask()
        except ServedError as error:
            assert "not healthy" in error.message
    raise AssertionError(f"asked {MAX_TRIES} times in vain")
