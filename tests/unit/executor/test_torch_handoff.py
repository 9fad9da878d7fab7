"""A prefill engine and a decode engine with a plain copy of blocks between their pools."""

from pathlib import Path

import pytest
import torch
from tiny_llama import Answer, Rig, random_prompt, reference_tokens, save_model
from transformers import LlamaForCausalLM

from kelp.core.types import FinishReason, Role
from kelp.executor.base import Prefilled, Tokens

NUM_TOKENS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny-llama-handoff")


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return save_model(folder)


def copy_blocks(source: Rig, exported: Answer, target: Rig, imported: Answer) -> int:
    """Move what the target lacks; returns how many blocks."""
    reserved = imported.reserved
    missing = slice(reserved.num_cached_blocks, None)
    remote, local = exported.announced[missing], list(reserved.block_ids[missing])
    assert len(exported.announced) == len(reserved.block_ids)
    target.kv[local] = source.kv[remote]
    return len(local)


def hand_over(source: Rig, target: Rig, prompt: list[int], **sampling: object) -> tuple[Answer, Answer]:
    exported = source.submit(prompt, NUM_TOKENS, Role.PREFILL, **sampling)
    imported = target.submit(prompt, NUM_TOKENS, Role.DECODE, **sampling)
    source.run()
    target.run()
    num_copied = copy_blocks(source, exported, target, imported)
    (first,) = exported.of(Tokens)
    source.engine.release_export(str(source.num_submitted - 1))
    request_id = str(target.num_submitted - 1)
    target.engine.complete_import(request_id, first.token_ids[0], first.log_probs[0], num_copied)
    target.run()
    return exported, imported


@pytest.mark.parametrize("num_prompt_tokens", [1, 4, 30, 32])
def test_decode_continues_with_the_tokens_of_an_aggregated_run(folder, model, num_prompt_tokens):
    prompt = random_prompt(1, num_prompt_tokens)
    source, target = Rig(folder, max_step_tokens=16, max_running=8), Rig(folder)
    exported, imported = hand_over(source, target, prompt)
    assert exported.tokens + imported.tokens == reference_tokens(model, prompt, NUM_TOKENS)
    assert exported.end.finish_reason is None
    assert imported.end.finish_reason is FinishReason.LENGTH
    assert source.pool.num_held == target.pool.num_held == 0


def test_sampling_continues_as_in_an_aggregated_run(folder, model):
    prompt = random_prompt(2, 17)
    sampling = {
        "temperature": 1.2,
        "seed": 77,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    together = Rig(folder).answer(prompt, NUM_TOKENS, **sampling).tokens
    exported, imported = hand_over(Rig(folder), Rig(folder), prompt, **sampling)
    assert exported.tokens + imported.tokens == together


def test_chunks_are_announced_as_they_finish_and_cover_the_prompt_once(folder, model):
    source = Rig(folder, max_step_tokens=8, max_running=8)
    exported = source.submit(random_prompt(3, 30), NUM_TOKENS, Role.PREFILL)
    source.run()
    assert [event.num_tokens for event in exported.of(Prefilled)] == [8, 16, 24, 30]
    assert len(set(exported.announced)) == 8
    kinds = [type(event).__name__ for event in exported.events]
    assert kinds[-3:] == ["Prefilled", "Tokens", "Completed"]


def test_cached_prompt_blocks_are_announced_before_anything_is_computed(folder, model):
    source = Rig(folder)
    prompt = random_prompt(4, 30)
    source.answer(prompt, 1)
    exported = source.submit(prompt, NUM_TOKENS, Role.PREFILL)
    source.run()
    assert [event.num_tokens for event in exported.of(Prefilled)] == [28, 30]


def test_a_decode_engine_asks_only_for_blocks_it_lacks(folder, model):
    prompt = random_prompt(5, 32)
    source, target = Rig(folder), Rig(folder)
    target.answer(prompt, 1)
    exported, imported = hand_over(source, target, prompt)
    assert imported.reserved.num_cached_blocks == 8
    assert exported.tokens + imported.tokens == reference_tokens(model, prompt, NUM_TOKENS)
    assert imported.end.usage.transferred_blocks == 0
    assert imported.end.usage.cached_tokens == 32


def test_imported_blocks_serve_later_prefix_hits(folder, model):
    prompt = random_prompt(6, 32)
    target = Rig(folder)
    hand_over(Rig(folder), target, prompt)
    answer = target.answer(prompt, NUM_TOKENS)
    assert answer.end.usage.cached_tokens == 28
    assert answer.tokens == reference_tokens(model, prompt, NUM_TOKENS)


def test_a_failed_import_is_computed_locally_first_token_included(folder, model):
    prompt = random_prompt(7, 32)
    target = Rig(folder)
    target.answer(prompt[:16], 1)
    imported = target.submit(prompt, NUM_TOKENS, Role.DECODE)
    target.run()
    target.kv[list(imported.reserved.block_ids[imported.reserved.num_cached_blocks :])] = 1e4
    target.engine.fail_import("1")
    target.run()
    assert imported.tokens == reference_tokens(model, prompt, NUM_TOKENS)
