"""Many mock workers in one tritonserver: they start, answer as the mock's reference says on every path, and stop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kelp.executor.mock.language import Vocabulary
from kelp.text.tokenizer import Tokenizer
from support.llm_client import http_post, sse_events
from support.serving import MODEL, KelpServer

NUM_DECODE = 8
MAX_TOKENS = 24
PROMPTS = [
    f"Ship {number} left the harbour with {number * 7} barrels of " + "salt and " * number for number in range(24)
]
INSTANT = {"mock.speedup": 0}


def start(mode: str, num_decode: int, **settings: object) -> KelpServer:
    started_s = time.monotonic()
    arguments = ("--engine", "mock", "--decode", str(num_decode))
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    server = KelpServer(mode, settings={**INSTANT, **dotted}, arguments=arguments).start()
    print(f"{mode}: {len(server.records())} mock workers served after {time.monotonic() - started_s:.1f} s")
    return server


@pytest.fixture(scope="module")
def fleet() -> Iterator[KelpServer]:
    with start("disaggregated", NUM_DECODE, router__disaggregation="always") as server:
        yield server


@pytest.fixture(scope="module")
def reference() -> dict[str, list[int]]:
    """What the mock says to each prompt."""
    tokenizer = Tokenizer(MODEL)
    vocabulary = Vocabulary(tokenizer.vocab_size, tuple(sorted(tokenizer.eos_token_ids)))
    return {prompt: vocabulary.continuation(tokenizer.encode(prompt).tolist(), MAX_TOKENS) for prompt in PROMPTS}


def ask_all(server: KelpServer) -> dict[str, dict[str, Any]]:
    def ask(prompt: str) -> dict[str, Any]:
        status, body = http_post(f"{server.http_url}/v2/models/llm/generate", fields(prompt))
        assert status == 200, body
        return dict(json.loads(body))

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(PROMPTS, pool.map(ask, PROMPTS), strict=True))


def fields(prompt: str) -> dict[str, Any]:
    return {"text_input": prompt, "max_tokens": MAX_TOKENS}


def tokens_of(answers: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    return {prompt: answer["output_ids"] for prompt, answer in answers.items()}


def test_every_worker_of_the_fleet_is_there(fleet: KelpServer) -> None:
    names = {"decode", *(f"decode_{index}" for index in range(1, NUM_DECODE))}
    assert set(fleet.records()) == {"prefill", *names}


def test_handed_over_prompts_are_answered_as_the_reference_says_and_nothing_stays_behind(
    fleet: KelpServer, reference: dict[str, list[int]]
) -> None:
    answers = ask_all(fleet)
    assert tokens_of(answers) == reference
    for answer in answers.values():
        prefill, decode = (worker.rpartition("/")[2] for worker in answer["worker_ids"])
        assert prefill == "prefill" and decode.startswith("decode")
    fleet.wait_quiet()


def test_a_stream_carries_the_same_tokens(fleet: KelpServer, reference: dict[str, list[int]]) -> None:
    prompt = PROMPTS[3]
    status, body = http_post(f"{fleet.http_url}/v2/models/llm/generate_stream", {**fields(prompt), "stream": True})
    assert status == 200
    said: list[int] = []
    for event in sse_events(body):
        ids = event.get("output_ids", [])
        said += ids if isinstance(ids, list) else [ids]
    assert said == reference[prompt]
    fleet.wait_quiet()


def test_an_aggregated_fleet_without_nixl_says_the_same(reference: dict[str, list[int]]) -> None:
    with start("aggregated", 2, handoff__transport="local", mock__tokens_per_step=8) as server:
        answers = ask_all(server)
        assert tokens_of(answers) == reference
        # Triton's JSON writes a tensor of one element without brackets.
        assert all(isinstance(answer["worker_ids"], str) for answer in answers.values())
        server.wait_quiet()
