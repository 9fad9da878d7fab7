"""Greedy tokens equal the Hugging Face reference, however they are served."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hf_reference import Expected
from prompts import LONGEST, MAX_STEP_TOKENS, MAX_TOKENS, PROMPTS

from support.llm_client import Answer
from support.serving import KelpServer

LAYOUTS = ("aggregated", "compact", "isolated")
BLOCK_TOKENS = 16


@pytest.fixture(params=LAYOUTS)
def served(request: pytest.FixtureRequest) -> KelpServer:
    return request.getfixturevalue(f"{request.param}_server")


def ask_all(server: KelpServer, num_at_once: int) -> dict[str, Answer]:
    """Every prompt once; each has a salt of its own, so that no prompt finds another's blocks in the cache."""

    def ask(name: str) -> Answer:
        fields: dict[str, Any] = {"stream": True, "return_log_probs": True, "cache_salt": f"parity of {name}"}
        return server.ask(**PROMPTS[name], max_tokens=MAX_TOKENS, **fields)

    with ThreadPoolExecutor(num_at_once) as pool:
        return dict(zip(PROMPTS, pool.map(ask, PROMPTS), strict=True))


def check_equal(answers: dict[str, Answer], expected: dict[str, Expected]) -> None:
    for name, answer in answers.items():
        reference = expected[name]
        assert answer.last.number("num_input_tokens") == len(reference.prompt_ids), name
        assert answer.token_ids == reference.token_ids, name
        assert answer.text == reference.text, name
        np.testing.assert_allclose(answer.log_probs, reference.log_probs, atol=1e-3, err_msg=name)


def test_the_prompts_are_many_clear_and_long_enough(expected: dict[str, Expected]) -> None:
    assert len(PROMPTS) >= 20
    assert len(expected[LONGEST].prompt_ids) >= 4 * MAX_STEP_TOKENS
    assert all(reference.margin > 1e-3 for reference in expected.values()), "rounding decides between two tokens"
    assert sum(len(reference.token_ids) < MAX_TOKENS for reference in expected.values()) >= 2, "some end by themselves"


def test_sixteen_at_once_get_the_reference_s_tokens_and_so_do_cached_prompts(
    served: KelpServer, expected: dict[str, Expected]
) -> None:
    answers = ask_all(served, num_at_once=16)
    check_equal(answers, expected)
    num_workers = len(served.records())
    for answer in answers.values():
        assert answer.last.number("cached_tokens") == 0
        assert len(answer.last.worker_ids) == num_workers
    served.wait_quiet()

    cached = ask_all(served, num_at_once=4)
    check_equal(cached, expected)
    for name, answer in cached.items():
        num_reusable_blocks = (len(expected[name].prompt_ids) - 1) // BLOCK_TOKENS
        assert answer.last.number("cached_tokens") == num_reusable_blocks * BLOCK_TOKENS, name
    served.wait_quiet()


def test_disaggregated_workers_live_in_different_processes(compact_server: KelpServer) -> None:
    assert compact_server.stub("prefill").pid != compact_server.stub("decode").pid
    assert len(compact_server.tritonservers()) == 1


def test_isolated_workers_live_in_different_servers(isolated_server: KelpServer) -> None:
    endpoints = {name: record.endpoint for name, record in isolated_server.records().items()}
    assert set(endpoints) == {"prefill", "decode"}
    assert len({*endpoints.values(), isolated_server.grpc_endpoint}) == 3
    assert len(isolated_server.tritonservers()) == 4, "one each for prefill, decode, the router and the block manager"
