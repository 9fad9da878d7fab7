"""Every family's greedy fp32 tokens and log-probs equal transformers', however the work is cut, batched or cached."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, VOCAB_SIZE, reference_answer, save_family
from tiny_llama import Answer, Rig, random_prompt

from kelp.core.clock import FakeClock
from kelp.core.errors import ConfigError
from kelp.executor.base import Tokens
from kelp.executor.batching.drafts import DraftContext
from kelp.executor.batching.engine import Engine

NUM_TOKENS = 10
LENGTHS = (1, 7, 40, 61)


@dataclass
class Family:
    folder: Path
    model: Any

    @cached_property
    def expected(self) -> list[tuple[list[int], list[float]]]:
        return [reference_answer(self.model, prompt(length), NUM_TOKENS) for length in LENGTHS]


def prompt(length: int) -> list[int]:
    return random_prompt(length, length)


def check(answer: Answer, expected: tuple[list[int], list[float]]) -> None:
    tokens, log_probs = expected
    assert answer.tokens == tokens
    assert [value for event in answer.of(Tokens) for value in event.log_probs] == pytest.approx(log_probs, abs=1e-3)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("family")
    return Family(folder, save_family(folder, request.param))


def test_the_reference_tells_prompts_apart_and_tokens_from_one_another(family):
    assert len({tuple(tokens) for tokens, _ in family.expected}) == len(LENGTHS)
    assert any(len(set(tokens)) > 3 for tokens, _ in family.expected)


@pytest.mark.parametrize("step_tokens", [7, 128])
def test_a_batch_is_answered_as_by_transformers_in_chunks_of_any_size(family, step_tokens):
    rig = Rig(family.folder, max_step_tokens=step_tokens, max_running=4)
    answers = [rig.submit(prompt(length), NUM_TOKENS) for length in LENGTHS]
    rig.run()
    for answer, expected in zip(answers, family.expected, strict=True):
        check(answer, expected)


def test_a_prefix_hit_changes_nothing(family):
    rig = Rig(family.folder)
    rig.answer(prompt(61)[:45], 1)
    answer = rig.answer(prompt(61), NUM_TOKENS)
    assert answer.end.usage.cached_tokens == 44
    check(answer, family.expected[-1])


@dataclass
class HalfRightProposer:
    """Drafts two tokens that come and one that does not."""

    texts: list[list[int]]

    def propose(self, contexts: Sequence[DraftContext]) -> list[npt.NDArray[np.int32]]:
        return [self._draft(context) for context in contexts]

    def _draft(self, context: DraftContext) -> npt.NDArray[np.int32]:
        next_tokens = self.texts[int(context.request_id)][len(context.tokens) :][:3]
        draft = [*next_tokens[:2], *[(token + 1) % VOCAB_SIZE for token in next_tokens[2:]]]
        return np.asarray(draft[: context.max_tokens], np.int32)


@pytest.mark.parametrize("step_tokens", [5, 24])
def test_preemption_small_chunks_and_drafts_together_change_nothing(family, step_tokens):
    prompts = [prompt(length) for length in (17, 18, 19, 20)]
    expected = [reference_answer(family.model, each, 2 * NUM_TOKENS) for each in prompts]
    rig = Rig(family.folder, num_blocks=24, max_step_tokens=step_tokens, max_running=4, num_draft_tokens=3)
    proposer = HalfRightProposer([each + tokens for each, (tokens, _) in zip(prompts, expected, strict=True)])
    rig.engine = Engine(rig.parts.runner, rig.pool, rig.parts.rules, FakeClock(), proposer=proposer)
    answers = [rig.submit(each, 2 * NUM_TOKENS) for each in prompts]
    rig.run()
    load = rig.engine.load()
    assert load.num_preemptions
    assert 0 < load.num_accepted_tokens < load.num_draft_tokens
    for answer, each in zip(answers, expected, strict=True):
        check(answer, each)


@pytest.mark.parametrize("name", ["qwen3-moe", "gemma3"])
def test_shards_load_like_a_single_file(tmp_path, name):
    model = save_family(tmp_path, name, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(Rig(tmp_path).answer(prompt(40), NUM_TOKENS), reference_answer(model, prompt(40), NUM_TOKENS))


def rename(name: str) -> str:
    """Mixtral's checkpoints as Mistral published them."""
    for new, old in [
        (".mlp.", ".block_sparse_moe."),
        (".gate_proj", ".w1"),
        (".up_proj", ".w3"),
        (".down_proj", ".w2"),
    ]:
        name = name.replace(new, old)
    return name


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All experts of a layer in one tensor, as transformers 5 holds them in memory."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        own = [f"{layer}.experts.{index}" for index in range(6) if f"{layer}.experts.{index}.up_proj.weight" in tensors]
        fused = [torch.cat([tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up")]) for name in own]
        kept[f"{layer}.experts.gate_up_proj"] = torch.stack(fused)
        kept[f"{layer}.experts.down_proj"] = torch.stack([tensors[f"{name}.down_proj.weight"] for name in own])
    return kept


def test_experts_load_from_every_spelling_of_the_checkpoint(tmp_path):
    model = save_family(tmp_path, "qwen3-moe")
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    expected = reference_answer(model, prompt(40), NUM_TOKENS)
    moved = {
        rename(name) if f"{name.split('.mlp.')[0]}.mlp.gate.weight" in tensors else name: tensor
        for name, tensor in tensors.items()
    }
    for spelling in (tensors, fuse(tensors), moved):
        assert any(".experts." in name for name in spelling)
        save_file(spelling, path)
        check(Rig(tmp_path).answer(prompt(40), NUM_TOKENS), expected)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen3-moe", "model.layers.2.mlp.experts.5.up_proj.weight"),
        ("gemma3", "model.layers.3.post_feedforward_layernorm.weight"),
    ],
)
def test_a_tensor_that_the_family_needs_is_named_when_it_lacks(tmp_path, name, tensor):
    save_family(tmp_path, name)
    path = tmp_path / "model.safetensors"
    tensors = {each: value.clone() for each, value in load_file(path).items() if each != tensor}
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=f"tensor {tensor} is missing"):
        Rig(tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "qwen3-moe"])
def test_bfloat16_rounds_where_transformers_rounds(tmp_path, name):
    model = save_family(tmp_path, name).to(torch.bfloat16)
    answer = Rig(tmp_path, dtype="bfloat16").answer(prompt(40), 1)
    with torch.inference_mode():
        log_probs = torch.log_softmax(model(torch.tensor([prompt(40)])).logits[0, -1].float(), dim=-1)
    (event,) = answer.of(Tokens)
    assert event.log_probs[0] == pytest.approx(float(log_probs[event.token_ids[0]]), abs=0.1)
