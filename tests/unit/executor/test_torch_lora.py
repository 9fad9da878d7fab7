"""Sequences with LoRA adapters get the tokens that PEFT computes, whatever else is in their batch."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny_llama import random_prompt, save_model
from tiny_lora import ATTENTION, AdaptedModel, adapter, log_probs, save_mixtral, save_qwen2

from kelp.core.clock import FakeClock
from kelp.executor.batching.batch import Chunk
from kelp.executor.batching.engine import Engine
from kelp.executor.batching.speculation import SpeculationRules
from kelp.executor.torch.inputs import make_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")

NUM_TOKENS = 16
CONFIGS = {
    "all": {},
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 4},
    "rank-stabilised": {"target_modules": r".*\.mlp\.(up|down)_proj", "use_rslora": True},
    "uneven": {"rank_pattern": {"k_proj": 2, "layers.0.mlp.up_proj": 3}, "alpha_pattern": {"o_proj": 9}},
    "one-layer": {"layers_to_transform": [1]},
}


@pytest.fixture(scope="module", params=[save_model, save_qwen2], ids=["llama", "qwen2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdaptedModel]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapted")
    configs = {name: adapter(**fields) for name, fields in CONFIGS.items()}
    yield AdaptedModel.save(request.param(folder), folder, configs)


def check(served: AdaptedModel, lora_name: str, prompt, answer) -> None:
    tokens, expected_log_probs = served.expected(lora_name, prompt, len(answer.tokens))
    assert answer.tokens == tokens, lora_name
    assert log_probs(answer) == pytest.approx(expected_log_probs, abs=1e-3), lora_name


def test_the_reference_differs_with_each_adapter(served):
    prompt = random_prompt(1, 12)
    answers = {tuple(served.expected(name, prompt, NUM_TOKENS)[0]) for name in ("", *CONFIGS)}
    assert len(answers) == len(CONFIGS) + 1


@pytest.mark.parametrize("lora_name", ["", *CONFIGS])
def test_each_adapter_alone_is_computed_as_by_peft(served, lora_name):
    prompt = random_prompt(2, 21)
    check(served, lora_name, prompt, served.rig().answer(prompt, NUM_TOKENS, lora_name=lora_name))


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 256},
        {"num_blocks": 256, "max_step_tokens": 9, "max_running": 9},
        {"num_blocks": 20, "max_step_tokens": 13, "max_running": 6},
    ],
    ids=["one-batch", "small-chunks", "preemption"],
)
def test_adapters_and_none_share_batches_without_disturbing_each_other(served, options):
    names = ["all", "", "attention", "rank-stabilised", "all", "uneven", "", "one-layer"]
    prompts = [random_prompt(seed, length) for seed, length in enumerate([5, 17, 3, 26, 11, 1, 8, 20])]
    rig = served.rig(**options)
    answers = [rig.submit(prompt, NUM_TOKENS, lora_name=name) for prompt, name in zip(prompts, names, strict=True)]
    rig.run()
    assert (rig.engine.load().num_preemptions > 0) == (options["num_blocks"] == 20)
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        check(served, name, prompt, answer)


def test_equal_prompts_share_blocks_within_an_adapter_only(served):
    rig = served.rig()
    prompt = random_prompt(4, 24)
    for name in ("", "all", "attention"):
        first, again = rig.answer(prompt, NUM_TOKENS, lora_name=name), rig.answer(prompt, NUM_TOKENS, lora_name=name)
        assert first.end.usage.cached_tokens == 0
        assert again.end.usage.cached_tokens == 20
        check(served, name, prompt, first)
        check(served, name, prompt, again)


def test_speculation_does_not_change_what_an_adapter_says(served):
    prompt = random_prompt(5, 6) * 4
    rig = served.rig()
    rules = replace(rig.parts.rules, speculation=SpeculationRules(num_draft_tokens=3))
    rig.engine = Engine(rig.parts.runner, rig.pool, rules, FakeClock())
    answers = {name: rig.submit(prompt, 40, lora_name=name) for name in ("", "all", "attention")}
    rig.run()
    assert rig.engine.load().num_draft_tokens > 0
    for name, answer in answers.items():
        check(served, name, prompt, answer)


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_gets_what_each_request_gets_alone(served, seed):
    draw = random.Random(seed)
    max_step_tokens = draw.randint(6, 40)
    rig = served.rig(num_blocks=draw.randint(24, 80), max_step_tokens=max_step_tokens, max_running=6)
    rules = replace(rig.parts.rules, speculation=SpeculationRules(num_draft_tokens=draw.choice([0, 2])))
    rig.engine = Engine(rig.parts.runner, rig.pool, rules, FakeClock())
    prompts = [random_prompt(seed, 8) + random_prompt(draw.randint(0, 9), draw.randint(1, 30)) for _ in range(8)]
    requests = [(draw.choice(["", *CONFIGS]), draw.choice(prompts)) for _ in range(14)]
    answers = []
    for name, prompt in requests:
        answers.append(rig.submit(prompt, draw.randint(1, NUM_TOKENS), lora_name=name))
        for _ in range(draw.randint(0, 6)):
            rig.engine.step()
    rig.run()
    for (name, prompt), answer in zip(requests, answers, strict=True):
        check(served, name, prompt, answer)
    assert rig.pool.num_held == 0


def test_a_step_without_adapters_has_no_rows_and_one_with_them_each_ones_rows():
    class NoAttention:
        def plan(self, chunks):
            return None

    def chunk(num_tokens, lora_name):
        return Chunk(torch.arange(num_tokens, dtype=torch.int32).numpy(), 0, [0], lora_name=lora_name)

    def rows(*chunks):
        adapters = make_inputs(chunks, NoAttention(), torch.device("cpu")).adapters
        return adapters and {adapter.name: adapter.rows.tolist() for adapter in adapters}

    assert rows(chunk(2, ""), chunk(1, "")) is None
    assert rows(chunk(2, "a"), chunk(1, ""), chunk(1, "b"), chunk(2, "a")) == {"a": [0, 1, 4, 5], "b": [3]}


def test_bfloat16_adapters_stay_close_to_float32(served):
    prompt = random_prompt(6, 30)
    answer = served.rig(dtype="bfloat16").answer(prompt, 1, lora_name="all")
    with torch.inference_mode(), served.active("all"):
        expected = torch.log_softmax(served.peft(torch.tensor([prompt])).logits[0, -1], dim=-1)
    assert log_probs(answer)[0] == pytest.approx(float(expected[answer.tokens[0]]), abs=0.5)


def test_a_mixture_of_experts_is_adapted_in_its_attention(tmp_path):
    served = AdaptedModel.save(save_mixtral(tmp_path), tmp_path, {"a": adapter(target_modules=ATTENTION)})
    prompt = random_prompt(7, 19)
    rig = served.rig()
    answers = {name: rig.submit(prompt, NUM_TOKENS, lora_name=name) for name in ("a", "")}
    rig.run()
    assert answers["a"].tokens != answers[""].tokens
    for name, answer in answers.items():
        check(served, name, prompt, answer)
