"""Several routers before mock workers: prefixes meet their blocks, decisions are explained, a dead router takes nobody
along."""

from __future__ import annotations

import json
import queue
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kelp.registry.directory import RouterDirectory
from support.llm_client import Call, ServedError, http_error, http_post
from support.serving import KelpServer
from support.waiting import wait_until

NUM_ROUTERS = 3
NUM_WORKERS = 4
DOCUMENT = "The lighthouse keeper wrote down the weather every evening, whether a ship had passed or not. "


@pytest.fixture(scope="module")
def served() -> Iterator[KelpServer]:
    arguments = ("--engine", "mock", "--decode", str(NUM_WORKERS), "--routers", str(NUM_ROUTERS))
    with KelpServer("aggregated", arguments=arguments).start() as server:
        yield server


def generate(server: KelpServer, **body: Any) -> dict[str, Any]:
    status, answer = http_post(f"{server.http_url}/v2/models/llm/generate", {"max_tokens": 8, **body})
    if status != 200:
        raise http_error(answer)
    return dict(json.loads(answer))


def explain(server: KelpServer, request_id: str) -> dict[str, Any]:
    return dict(json.loads(generate(server, text_input="", kelp_explain=request_id)["text_output"]))


def model_of(worker_id: str) -> str:
    return worker_id.rpartition("/")[2]


def worker_of(answer: dict[str, Any]) -> str:
    return model_of(answer["worker_ids"])


def routers_known(server: KelpServer) -> int:
    return len(list(server.registry_folder.glob("*.router.json")))


def test_each_router_is_a_process_of_its_own_and_knows_the_others(served: KelpServer) -> None:
    assert routers_known(served) == NUM_ROUTERS
    stubs = {argument for process in served.family() for argument in process.cmdline() if argument.startswith("llm_0_")}
    assert len(stubs) == NUM_ROUTERS


def test_every_decision_is_explained_by_whichever_router_is_asked(served: KelpServer) -> None:
    ids = [f"explained-{number}" for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda name: generate(served, id=name, text_input=f"{name}: {DOCUMENT}"), ids))
    for name, answer in zip(ids, answers, strict=True):
        explanation = explain(served, name)
        assert explanation["request_id"] == name
        chosen = explanation["choices"][0]
        assert model_of(chosen["chosen"]) == worker_of(answer)
        assert len(chosen["candidates"]) == NUM_WORKERS
        assert explanation["outcome"]["state"] == "completed"
        assert explanation["outcome"]["num_output_tokens"] == 8


def test_an_unknown_decision_is_not_found(served: KelpServer) -> None:
    with pytest.raises(ServedError) as caught:
        explain(served, "never-asked")
    assert caught.value.code == "NOT_FOUND"


def test_requests_with_one_prefix_meet_its_blocks_whichever_router_places_them(served: KelpServer) -> None:
    prompts = [f"{name}. {DOCUMENT * 8}" for name in ("first", "second", "third")]
    for prompt in prompts:
        generate(served, text_input=prompt)
    num_met = 0
    for number in range(6):
        for prompt in prompts:
            served.wait_quiet()
            answer = generate(served, text_input=f"{prompt} And then? {number}")
            num_met += answer["cached_tokens"] > 100
    assert num_met >= 16


def test_a_burst_over_all_routers_spreads_over_all_workers(served: KelpServer) -> None:
    with ThreadPoolExecutor(16) as pool:
        asked = [f"burst {number}: {number * 7919}" for number in range(32)]
        answers = list(pool.map(lambda text: generate(served, text_input=text, max_tokens=64, ignore_eos=True), asked))
    load = Counter(worker_of(answer) for answer in answers)
    assert len(load) == NUM_WORKERS
    assert max(load.values()) <= 3 * len(asked) / NUM_WORKERS / 2


def test_a_pinned_worker_serves_and_an_unknown_one_is_refused(served: KelpServer) -> None:
    for name in ("decode", "decode_1", "decode_2"):
        assert worker_of(generate(served, text_input="pinned", kelp_worker=name)) == name
    with pytest.raises(ServedError) as caught:
        generate(served, text_input="pinned", kelp_worker="decode_77")
    assert caught.value.code == "OVERLOADED"
    with pytest.raises(ServedError) as caught:
        generate(served, text_input="tagged", kelp_require_tags="zone")
    assert caught.value.code == "INVALID_ARGUMENT"


def test_a_killed_router_takes_no_other_routers_request_along() -> None:
    arguments = ("--engine", "mock", "--decode", "2", "--routers", str(NUM_ROUTERS))
    server = KelpServer("aggregated", arguments=arguments).start()
    try:
        calls = [
            server.open(text_input=f"{number}: {DOCUMENT}", max_tokens=256, ignore_eos=True) for number in range(9)
        ]
        for call in calls:
            call.next()
        server.stub("llm").kill()
        with ThreadPoolExecutor(len(calls)) as pool:
            finished = list(pool.map(finishes, calls))
        assert finished.count(True) >= len(calls) * (NUM_ROUTERS - 1) // NUM_ROUTERS
        wait_until(lambda: len(live_routers(server)) == NUM_ROUTERS - 1, "its record to expire", 20.0)
        outcomes = Counter(outcome(server, number) for number in range(12))
        assert outcomes["answered"] >= 6
        assert set(outcomes) <= {"answered", "not healthy"}
    finally:
        server.kill()


def finishes(call: Call) -> bool:
    """False for a stream that the dead process has left silent: Triton does not end it."""
    end_s = time.monotonic() + 30.0
    try:
        while not call.next(timeout_s=max(0.1, end_s - time.monotonic())).is_last:
            pass
    except queue.Empty:
        return False
    return True


def live_routers(server: KelpServer) -> list[str]:
    return [record.router_id for record in RouterDirectory(server.registry_folder, 5.0).snapshot()]


def outcome(server: KelpServer, number: int) -> str:
    try:
        generate(server, text_input=f"after {number}")
    except ServedError as error:
        return "not healthy" if "not healthy" in error.message else error.message
    return "answered"
