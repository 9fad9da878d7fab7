"""Greedy fp32 tokens of the engine equal transformers', however the work was cut, shared or interrupted."""

from pathlib import Path

import pytest
import torch
from tiny_llama import LLAMA3_ROPE, Rig, random_prompt, reference_tokens, save_model
from transformers import LlamaForCausalLM

from kelp.core.types import FinishReason
from kelp.executor.base import Completed

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny-llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return save_model(folder)


def test_the_reference_is_not_a_constant(model: LlamaForCausalLM):
    answers = [tuple(reference_tokens(model, random_prompt(seed, 9), NUM_TOKENS)) for seed in range(4)]
    assert len(set(answers)) == 4
    assert all(len(set(answer)) > 3 for answer in answers)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 31, 64, 100])
def test_a_prompt_of_any_length_is_continued_as_by_transformers(folder, model, num_tokens):
    prompt = random_prompt(num_tokens, num_tokens)
    answer = Rig(folder, max_step_tokens=128).answer(prompt, NUM_TOKENS)
    assert answer.tokens == reference_tokens(model, prompt, NUM_TOKENS)
    assert isinstance(answer.end, Completed)
    assert answer.end.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("step_tokens", [3, 4, 7, 32])
def test_chunked_prefill_changes_no_token(folder, model, step_tokens):
    prompt = random_prompt(1, 50)
    rig = Rig(folder, max_step_tokens=step_tokens, max_running=3)
    assert rig.answer(prompt, NUM_TOKENS).tokens == reference_tokens(model, prompt, NUM_TOKENS)


@pytest.mark.parametrize("num_shared", [8, 30, 33])
def test_a_prefix_hit_changes_no_token_and_is_counted(folder, model, num_shared):
    rig = Rig(folder)
    first = random_prompt(2, 33)
    rig.answer(first, 4)
    prompt = first[:num_shared] + random_prompt(3, 40 - num_shared)
    answer = rig.answer(prompt, NUM_TOKENS)
    assert answer.tokens == reference_tokens(model, prompt, NUM_TOKENS)
    assert isinstance(answer.end, Completed)
    assert answer.end.usage.cached_tokens == num_shared // 4 * 4
    assert answer.end.usage.reused_blocks == num_shared // 4


def test_a_fully_cached_prompt_still_recomputes_its_last_token(folder, model):
    rig = Rig(folder)
    prompt = random_prompt(4, 32)
    first, second = rig.answer(prompt, NUM_TOKENS), rig.answer(prompt, NUM_TOKENS)
    assert first.tokens == second.tokens == reference_tokens(model, prompt, NUM_TOKENS)
    assert second.end.usage.cached_tokens == 28


def test_generated_blocks_are_reused_by_a_follow_up_prompt(folder, model):
    rig = Rig(folder)
    prompt = random_prompt(5, 10)
    output = rig.answer(prompt, 15).tokens
    follow_up = prompt + output + random_prompt(6, 3)
    answer = rig.answer(follow_up, NUM_TOKENS)
    assert answer.end.usage.cached_tokens == 24
    assert answer.tokens == reference_tokens(model, follow_up, NUM_TOKENS)


def test_without_prefix_cache_nothing_is_reused(folder):
    rig = Rig(folder, enable_prefix_cache=False)
    prompt = random_prompt(4, 32)
    rig.answer(prompt, 2)
    assert rig.answer(prompt, 2).end.usage.cached_tokens == 0
    assert rig.pool.num_free == rig.pool.num_blocks


def test_eight_concurrent_requests_of_unequal_length_do_not_disturb_each_other(folder, model):
    rig = Rig(folder, max_step_tokens=20, max_running=8, num_blocks=256)
    prompts = [random_prompt(seed, length) for seed, length in enumerate([1, 5, 8, 17, 33, 40, 66, 90])]
    answers = [rig.submit(prompt, NUM_TOKENS) for prompt in prompts]
    rig.run()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == reference_tokens(model, prompt, NUM_TOKENS)
    assert rig.pool.num_held == 0


def test_preempted_requests_are_recomputed_to_the_same_tokens(folder, model):
    rig = Rig(folder, num_blocks=16)
    prompts = [random_prompt(seed, 12) for seed in range(4)]
    answers = [rig.submit(prompt, NUM_TOKENS) for prompt in prompts]
    rig.run()
    assert rig.engine.load().num_preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == reference_tokens(model, prompt, NUM_TOKENS)
    assert rig.pool.num_held == 0


def test_a_log_prob_is_that_of_the_token_under_the_raw_logits(folder, model):
    prompt = random_prompt(8, 11)
    answer = Rig(folder).answer(prompt, 1, temperature=0.5, seed=3)
    (event,) = answer.events[-2:-1]
    with torch.inference_mode():
        log_probs = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)
    assert event.log_probs[0] == pytest.approx(float(log_probs[event.token_ids[0]]), abs=1e-4)


def test_sampling_is_the_same_alone_and_in_a_batch(folder):
    prompt = random_prompt(9, 21)
    chosen = {"temperature": 1.0, "seed": 5}
    alone = Rig(folder).answer(prompt, NUM_TOKENS, **chosen).tokens
    rig = Rig(folder, max_step_tokens=16, max_running=8)
    others = [rig.submit(random_prompt(seed, 13), NUM_TOKENS, temperature=1.0, seed=seed) for seed in (1, 2)]
    together = rig.submit(prompt, NUM_TOKENS, **chosen)
    rig.run()
    assert together.tokens == alone
    assert all(len(other.tokens) == NUM_TOKENS and other.tokens != alone for other in others)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": LLAMA3_ROPE},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 6},
        {"head_dim": 16},
        {"rms_norm_eps": 1e-2},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_model_variants_agree_with_transformers(tmp_path, overrides):
    model = save_model(tmp_path, **overrides)
    prompt = random_prompt(10, 70)
    answer = Rig(tmp_path, max_step_tokens=80).answer(prompt, NUM_TOKENS)
    assert answer.tokens == reference_tokens(model, prompt, NUM_TOKENS)


def test_a_sharded_model_loads_like_a_single_file(tmp_path, model):
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    prompt = random_prompt(11, 20)
    assert Rig(sharded).answer(prompt, NUM_TOKENS).tokens == reference_tokens(model, prompt, NUM_TOKENS)


def test_bfloat16_runs_and_stays_close_to_float32(folder, model):
    prompt = random_prompt(12, 30)
    answer = Rig(folder, dtype="bfloat16").answer(prompt, 1)
    with torch.inference_mode():
        log_probs = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)
    event = answer.events[-2]
    assert event.log_probs[0] == pytest.approx(float(log_probs[event.token_ids[0]]), abs=0.5)
