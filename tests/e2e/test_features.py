"""What a request may ask for, through the whole graph."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hf_reference import Expected
from prompts import LONGEST, MAX_TOKENS, PROMPTS

from support.llm_client import http_get
from support.serving import HOST, KelpServer
from support.waiting import wait_until

CAPITAL = PROMPTS["capital"]


@pytest.mark.parametrize("name", ["emoji", "chinese", "arabic", "chat, multilingual", LONGEST])
def test_deltas_add_up_to_the_unary_text(server: KelpServer, expected: dict[str, Expected], name: str) -> None:
    streamed = server.ask(**PROMPTS[name], max_tokens=MAX_TOKENS, stream=True)
    whole = server.ask(**PROMPTS[name], max_tokens=MAX_TOKENS)
    assert len(whole.responses) == 1
    assert len(streamed.responses) > 1
    assert streamed.text == whole.text == expected[name].text
    assert streamed.token_ids == whole.token_ids == expected[name].token_ids


def test_no_delta_cuts_a_character(server: KelpServer) -> None:
    prompt = json.dumps(
        [{"role": "user", "content": "Repeat exactly: 😀😃🌈🇫🇷 你好世界 👩‍👩‍👧 привет"}], ensure_ascii=False
    )
    answer = server.ask(messages=prompt, max_tokens=48, stream=True)
    assert any(ord(character) > 0x7F for character in answer.text), "the answer has multi-byte characters"
    # `Response.text` decodes each delta strictly; a held-back byte would show as a replacement character.
    assert "\ufffd" not in answer.text.rstrip("\ufffd")


def test_every_token_gets_one_log_prob_and_they_are_the_reference_s(
    server: KelpServer, expected: dict[str, Expected]
) -> None:
    answer = server.ask(**PROMPTS["code"], max_tokens=MAX_TOKENS, stream=True, return_log_probs=True)
    assert len(answer.log_probs) == len(answer.token_ids) == MAX_TOKENS
    assert max(answer.log_probs) <= 0
    np.testing.assert_allclose(answer.log_probs, expected["code"].log_probs, atol=1e-3)


def test_log_probs_come_only_when_asked_for(server: KelpServer) -> None:
    assert "output_log_probs" not in server.ask(**CAPITAL, max_tokens=2).last.tensors


def test_max_tokens_ends_an_answer_by_length(server: KelpServer) -> None:
    for max_tokens in (1, 2, 7):
        answer = server.ask(**CAPITAL, max_tokens=max_tokens, stream=True)
        assert len(answer.token_ids) == max_tokens
        assert [response.finish_reason for response in answer.responses[:-1]] == [""] * (len(answer.responses) - 1)
        assert answer.last.finish_reason == "length"


def test_without_max_tokens_an_answer_has_sixteen(server: KelpServer) -> None:
    assert len(server.ask(**PROMPTS["counting"]).token_ids) == 16


def test_the_end_token_ends_an_answer_by_stop_and_is_no_text(server: KelpServer, expected: dict[str, Expected]) -> None:
    answer = server.ask(**PROMPTS["chat"], max_tokens=MAX_TOKENS)
    assert answer.last.finish_reason == "stop"
    assert answer.token_ids == expected["chat"].token_ids
    assert len(answer.token_ids) < MAX_TOKENS
    assert "<|" not in answer.text


def test_ignore_eos_generates_on(server: KelpServer, expected: dict[str, Expected]) -> None:
    answer = server.ask(**PROMPTS["chat"], max_tokens=MAX_TOKENS, ignore_eos=True)
    assert len(answer.token_ids) == MAX_TOKENS
    assert answer.last.finish_reason == "length"
    assert answer.token_ids[: len(expected["chat"].token_ids)] == expected["chat"].token_ids


def test_min_tokens_puts_off_the_end(server: KelpServer, expected: dict[str, Expected]) -> None:
    natural = len(expected["chat"].token_ids)
    answer = server.ask(**PROMPTS["chat"], max_tokens=MAX_TOKENS, min_tokens=natural + 3)
    assert len(answer.token_ids) >= natural + 3
    assert answer.token_ids[: natural - 1] == expected["chat"].token_ids[:-1]


def test_end_id_is_one_more_end(server: KelpServer, expected: dict[str, Expected]) -> None:
    end_id = expected["capital"].token_ids[3]
    answer = server.ask(**CAPITAL, max_tokens=MAX_TOKENS, end_id=end_id)
    cut = expected["capital"].token_ids.index(end_id) + 1
    assert answer.token_ids == expected["capital"].token_ids[:cut]
    assert answer.last.finish_reason == "stop"


@pytest.mark.parametrize("is_streaming", [True, False], ids=["streaming", "whole"])
def test_a_stop_word_cuts_the_text_and_ends_the_work(server: KelpServer, is_streaming: bool) -> None:
    long = server.ask(**PROMPTS["counting"], max_tokens=100)
    stop_word = "15,"
    assert stop_word in long.text
    answer = server.ask(
        **PROMPTS["counting"], max_tokens=100, stream=is_streaming, stop_words=["never said", stop_word]
    )
    assert answer.text == long.text[: long.text.index(stop_word)]
    assert answer.last.finish_reason == "stop"
    assert len(answer.token_ids) < len(long.token_ids)
    server.wait_quiet()


def test_a_stop_word_in_the_first_token_leaves_no_text(server: KelpServer, expected: dict[str, Expected]) -> None:
    first = expected["capital"].text[:3]
    answer = server.ask(**CAPITAL, max_tokens=50, stop_words=[first])
    assert answer.text == ""
    assert answer.last.finish_reason == "stop"


def test_bad_words_are_not_generated(server: KelpServer) -> None:
    assert "Paris" in server.ask(**CAPITAL, max_tokens=4).text
    assert "Paris" not in server.ask(**CAPITAL, max_tokens=8, bad_words=["Paris"]).text


SAMPLED: dict[str, Any] = {**CAPITAL, "max_tokens": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 50}


def test_a_seed_reproduces_and_another_does_not(server: KelpServer) -> None:
    first, again, other = (server.ask(**SAMPLED, random_seed=seed).token_ids for seed in (7, 7, 8))
    assert first == again != other


def test_without_a_seed_sampling_differs(server: KelpServer) -> None:
    assert len({tuple(server.ask(**SAMPLED).token_ids) for _ in range(3)}) > 1


def test_a_seed_gives_the_same_tokens_aggregated_and_disaggregated(
    server: KelpServer, aggregated_server: KelpServer
) -> None:
    assert server.ask(**SAMPLED, random_seed=11).token_ids == aggregated_server.ask(**SAMPLED, random_seed=11).token_ids


def test_input_ids_are_a_prompt(server: KelpServer, expected: dict[str, Expected]) -> None:
    ids = np.array(expected["german"].prompt_ids, dtype=np.int32)
    answer = server.ask(input_ids=ids, input_lengths=len(ids), request_output_len=MAX_TOKENS)
    assert answer.token_ids == expected["german"].token_ids


@pytest.mark.parametrize("is_streaming", [True, False], ids=["streaming", "whole"])
def test_the_prompt_comes_first_when_asked_for(
    server: KelpServer, expected: dict[str, Expected], is_streaming: bool
) -> None:
    answer = server.ask(**CAPITAL, max_tokens=MAX_TOKENS, exclude_input_in_output=False, stream=is_streaming)
    assert answer.text == CAPITAL["text_input"] + expected["capital"].text
    assert answer.token_ids == expected["capital"].token_ids


def test_the_last_response_alone_sums_up(server: KelpServer, expected: dict[str, Expected]) -> None:
    before_ns = time.time_ns()
    answer = server.ask(**PROMPTS["story"], max_tokens=8, stream=True, cache_salt=f"sums up {before_ns}")
    summary = {
        "sequence_length", "cached_tokens", "num_input_tokens", "num_output_tokens", "worker_ids",
        "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks", "arrival_time_ns",
        "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns",
    }  # fmt: skip
    for response in answer.responses[:-1]:
        assert set(response.tensors) == {"text_output", "output_ids", "sequence_index", "finish_reason"}
    last = answer.last
    assert set(last.tensors) == {"text_output", "output_ids", "sequence_index", "finish_reason", *summary}
    num_prompt = len(expected["story"].prompt_ids)
    assert last.number("num_input_tokens") == num_prompt
    assert last.number("num_output_tokens") == 8
    assert last.number("sequence_length") == num_prompt + 8
    assert last.number("cached_tokens") == 0
    assert last.number("kv_cache_reused_blocks") == 0
    assert last.number("kv_cache_alloc_new_blocks") == last.number("kv_cache_alloc_total_blocks") >= num_prompt // 16
    order = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
    times = [before_ns, *(last.number(name) for name in order), time.time_ns()]
    assert times == sorted(times)
    assert last.worker_ids == [f"{HOST}:{server.grpc_port}/prefill", f"{HOST}:{server.grpc_port}/decode"]


def test_another_salt_shares_no_cached_block(server: KelpServer) -> None:
    def cached(salt: str) -> int:
        return server.ask(**PROMPTS["story"], max_tokens=2, cache_salt=salt).last.number("cached_tokens")

    assert cached("tenant one") == 0
    assert cached("tenant one") > 0
    assert cached("tenant two") == 0


def kelp_metrics(server: KelpServer) -> dict[str, float]:
    _, body = http_get(f"http://{HOST}:{server.metrics_port}/metrics")
    lines = [line for line in body.decode().splitlines() if line.startswith("kelp_")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_metrics_port_counts_requests_and_tokens(server: KelpServer) -> None:
    server.ask(**PROMPTS["story"], max_tokens=5)
    served = kelp_metrics(server)

    def counted(name: str, increase: float) -> None:
        wait_until(lambda: kelp_metrics(server).get(name, 0) >= served.get(name, 0) + increase, name)

    answer = server.ask(**PROMPTS["story"], max_tokens=5, cache_salt="metrics")
    counted('kelp_requests_total{outcome="ok"}', 1)
    counted("kelp_output_tokens_total", 5)
    counted("kelp_prompt_tokens_total", answer.last.number("num_input_tokens"))
    counted("kelp_transferred_blocks_total", 1)
    counted("kelp_ttft_seconds_count", 1)
    for phase in ("queue", "prefill", "relay", "transfer", "first_step"):
        counted(f'kelp_phase_seconds_count{{phase="{phase}"}}', 1)
    blocks = {name for name in kelp_metrics(server) if name.startswith("kelp_kv_blocks")}
    assert all(any(worker in name for name in blocks) for worker in ('worker="prefill"', 'worker="decode"'))
