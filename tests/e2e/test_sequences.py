"""Several sequences of one prompt, through the whole graph."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hf_reference import Expected
from prompts import MAX_TOKENS, PROMPTS

from support.llm_client import Answer, http_post
from support.serving import KelpServer

BLOCK_SIZE = 16
SAMPLED: dict[str, Any] = {**PROMPTS["capital"], "max_tokens": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 50}


@pytest.fixture(params=["disaggregated", "aggregated"])
def either_server(request: pytest.FixtureRequest) -> KelpServer:
    """Prefill and decode apart, then in one worker; quiet again when the test is over."""
    if request.param == "aggregated":
        server: KelpServer = request.getfixturevalue("aggregated_server")
        request.addfinalizer(server.wait_quiet)
        return server
    server = request.getfixturevalue("server")
    return server


def tokens_by_sequence(answer: Answer) -> dict[int, list[int]]:
    """Tokens of each sequence, streamed or not."""
    if len(answer.responses) == 1:
        tensors = answer.last.tensors
        ends = np.cumsum(tensors["sequence_length"] - answer.last.number("num_input_tokens"))
        parts = np.split(tensors["output_ids"], ends[:-1])
        return {int(index): part.tolist() for index, part in zip(tensors["sequence_index"], parts, strict=True)}
    found: dict[int, list[int]] = {}
    for response in answer.responses:
        found.setdefault(response.number("sequence_index"), []).extend(response.token_ids)
    return found


@pytest.mark.parametrize("is_streaming", [True, False], ids=["streaming", "whole"])
def test_each_sampled_sequence_is_the_only_answer_to_its_own_seed(
    either_server: KelpServer, is_streaming: bool
) -> None:
    answer = either_server.ask(**SAMPLED, random_seed=7, num_return_sequences=3, stream=is_streaming)
    alone = [either_server.ask(**SAMPLED, random_seed=7 + index) for index in range(3)]
    assert tokens_by_sequence(answer) == {index: only.token_ids for index, only in enumerate(alone)}
    assert answer.last.number("num_output_tokens") == sum(len(only.token_ids) for only in alone)
    if not is_streaming:
        assert [text.decode() for text in answer.last.tensors["text_output"]] == [only.text for only in alone]


def test_every_streamed_sequence_ends_once_and_the_last_response_sums_up(either_server: KelpServer) -> None:
    answer = either_server.ask(**SAMPLED, random_seed=3, ignore_eos=True, num_return_sequences=3, stream=True)
    ended = [response for response in answer.responses if response.finish_reason]
    assert sorted(response.number("sequence_index") for response in ended) == [0, 1, 2]
    length = answer.last.number("num_input_tokens") + SAMPLED["max_tokens"]
    assert [(response.finish_reason, response.number("sequence_length")) for response in ended] == [
        ("length", length)
    ] * 3
    assert ended[-1] is answer.last
    assert [response for response in answer.responses if "num_output_tokens" in response.tensors] == [answer.last]


def test_greedy_sequences_are_all_the_same(either_server: KelpServer, expected: dict[str, Expected]) -> None:
    parameters = json.dumps({"n": 2})
    answer = either_server.ask(**PROMPTS["capital"], max_tokens=MAX_TOKENS, sampling_parameters=parameters)
    assert tokens_by_sequence(answer) == dict.fromkeys((0, 1), expected["capital"].token_ids)


@pytest.mark.parametrize("name", ["story", "many chunks"])
def test_siblings_compute_none_of_the_prompts_full_blocks(either_server: KelpServer, name: str) -> None:
    salt = f"siblings {time.time_ns()}"
    answer = either_server.ask(**PROMPTS[name], max_tokens=4, num_return_sequences=3, cache_salt=salt)
    # Of a prompt that ends with a block, the last token is computed anyway: its logits are needed.
    num_full_blocks = (answer.last.number("num_input_tokens") - 1) // BLOCK_SIZE
    assert answer.last.number("cached_tokens") == 0
    assert answer.last.number("kv_cache_reused_blocks") == 2 * num_full_blocks


def test_generate_answers_with_a_list_per_field_and_with_plain_values_for_one_sequence(server: KelpServer) -> None:
    def generate(count: int) -> dict[str, Any]:
        body = {**PROMPTS["capital"], "max_tokens": 5, "num_return_sequences": count}
        status, reply = http_post(f"{server.http_url}/v2/models/llm/generate", body)
        assert status == 200, reply
        answer: dict[str, Any] = json.loads(reply)
        return answer

    one, three = generate(1), generate(3)
    assert isinstance(one["text_output"], str)
    assert (one["finish_reason"], one["sequence_index"]) == ("length", 0)
    assert three["text_output"] == [one["text_output"]] * 3
    assert (three["finish_reason"], three["sequence_index"]) == (["length"] * 3, [0, 1, 2])
    assert three["output_ids"] == one["output_ids"] * 3


def test_a_client_that_goes_takes_all_sequences_along(either_server: KelpServer) -> None:
    fields = {**SAMPLED, "max_tokens": 400, "ignore_eos": True, "num_return_sequences": 3}
    with either_server.open(**fields) as call:
        seen: set[int] = set()
        while len(seen) < 3:
            seen.add(call.next().number("sequence_index"))
    either_server.wait_quiet()
