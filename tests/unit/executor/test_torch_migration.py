"""A sequence that goes on at another worker says what it would have said at the first one, wherever it was cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import Answer, Rig, random_prompt, save_model

from kelp.core.guide_spec import GuideSpec
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import FinishReason, Role
from kelp.executor.base import Completed, ExecutorRequest, Tokens
from support.guided import GuidedBench

NUM_TOKENS = 14
PROMPT = random_prompt(3, 9)
SEEDED = {"temperature": 1.0, "seed": 11}
SCHEMA = (
    '{"type": "object", "additionalProperties": false, "required": ["a", "b"],'
    ' "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["abc", "true12"]}}}'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def workers(folder: Path) -> tuple[Rig, Rig]:
    """The second one cuts its work in other pieces and drafts, as another worker under another load would."""
    return Rig(folder), Rig(folder, max_step_tokens=7, max_running=4, num_draft_tokens=4)


@pytest.fixture(scope="module")
def greedy(workers: tuple[Rig, Rig]) -> list[int]:
    return run(workers[0], SamplingParams(max_tokens=NUM_TOKENS)).tokens


def run(rig: Rig, sampling: SamplingParams, generated: list[int] | None = None, role: Role = Role.AGGREGATED) -> Answer:
    """One request to its end; `generated` is what it said elsewhere."""
    answer, output = Answer(), generated or []
    rig.num_submitted += 1
    request = ExecutorRequest(
        request_id=f"migrated {rig.num_submitted}",
        prompt=np.asarray([*PROMPT, *output], np.int32),
        role=role,
        sampling=sampling,
        seed_hash=seed_hash("tiny"),
        sink=answer.events.append,
        num_generated=len(output),
    )
    rig.engine.add(request, 1)
    rig.run()
    rig.engine.release_export(request.request_id)
    return answer


def log_probs(answer: Answer) -> list[float]:
    return [log_prob for event in answer.of(Tokens) for log_prob in event.log_probs]


def reason(answer: Answer) -> FinishReason | None:
    assert isinstance(answer.end, Completed)
    return answer.end.finish_reason


def check_all_cuts(workers: tuple[Rig, Rig], sampling: SamplingParams) -> Answer:
    first, second = workers
    whole = run(first, sampling)
    assert len(whole.tokens) > 4
    for cut in range(1, len(whole.tokens)):
        resumed = run(second, sampling, whole.tokens[:cut])
        assert resumed.tokens == whole.tokens[cut:], f"cut after {cut}"
        assert log_probs(resumed) == pytest.approx(log_probs(whole)[cut:], abs=1e-4)
        assert reason(resumed) is reason(whole)
    return whole


@pytest.mark.parametrize(
    "fields",
    [
        {},
        SEEDED,
        {**SEEDED, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        {**SEEDED, "repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.7},
    ],
    ids=["greedy", "seeded", "seeded and cut", "repetition", "presence and frequency", "seeded and penalised"],
)
def test_wherever_it_is_cut_tokens_and_log_probs_are_those_of_one_worker(workers, fields):
    check_all_cuts(workers, SamplingParams(max_tokens=NUM_TOKENS, **fields))


def test_penalties_count_what_was_said_elsewhere_as_output_and_the_prompt_not(workers, greedy):
    sampling = SamplingParams(max_tokens=NUM_TOKENS, presence_penalty=100.0)
    whole = check_all_cuts(workers, sampling).tokens
    assert whole != greedy and len(set(whole)) == len(whole), "no token of the output may come twice"
    assert set(whole) & set(PROMPT), "tokens of the prompt may come"


def test_min_tokens_count_from_the_first_worker(workers, greedy):
    stop = (greedy[2],)
    assert len(run(workers[0], SamplingParams(max_tokens=40, stop_token_ids=stop)).tokens) == greedy.index(stop[0]) + 1
    whole = check_all_cuts(workers, SamplingParams(max_tokens=NUM_TOKENS, min_tokens=9, stop_token_ids=stop)).tokens
    assert stop[0] not in whole[:9]


def test_bad_words_are_seen_across_the_cut(workers, greedy):
    word = (greedy[4], greedy[5])
    whole = check_all_cuts(workers, SamplingParams(max_tokens=NUM_TOKENS, bad_words_ids=(word,))).tokens
    assert whole[:5] == greedy[:5] and whole[5] != greedy[5]


def test_a_remote_prefill_of_what_was_said_yields_the_next_token(workers, greedy):
    for cut in (1, 6):
        sampling = SamplingParams(max_tokens=NUM_TOKENS)
        assert run(workers[1], sampling, greedy[:cut], Role.PREFILL).tokens == [greedy[cut]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_guided_answer_is_taken_up_where_its_grammar_was(tmp_path, temperature):
    bench = GuidedBench(tmp_path)
    guide = GuideSpec(kind="json_schema", text=SCHEMA, is_compact=True)
    sampling = SamplingParams(max_tokens=60, temperature=temperature, seed=5, frequency_penalty=0.5, guide=guide)
    whole = bench.run(sampling)
    assert len(whole.token_ids) > 5 and whole.reason is FinishReason.STOP
    for cut in range(1, len(whole.token_ids)):
        resumed = bench.run(sampling, whole.token_ids[:cut], num_drafts=cut % 3)
        assert resumed.token_ids == whole.token_ids[cut:], f"cut after {cut}"
        assert resumed.reason is whole.reason
