"""Requests with LoRA adapters get the tokens that transformers with PEFT computes, beside requests without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_reference import Expected, HuggingFace
from peft import LoraConfig, PeftModel, get_peft_model
from prompts import MAX_STEP_TOKENS, PROMPTS

from support.llm_client import Answer, ServedError
from support.serving import MODEL, KelpServer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MAX_TOKENS = 12
BLOCK_TOKENS = 16
NAMES = ("capital", "question", "chat about code", "two chunks")
CONFIGS = {
    "attention": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "org/mlp-v1.0": {
        "r": 4,
        "lora_alpha": 3,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "use_rslora": True,
    },
}


class Adapted(HuggingFace):
    """SmolLM2 with random adapters."""

    def __init__(self, configs: dict[str, dict[str, Any]]) -> None:
        super().__init__(MODEL, torch.float32)
        torch.manual_seed(5)
        (first, fields), *others = configs.items()
        peft: PeftModel = get_peft_model(self._model, _config(fields), adapter_name=first)
        for name, fields in others:
            peft.add_adapter(name, _config(fields))
        self._model = self.peft = peft.eval()

    def answer(self, lora_name: str, prompt_name: str) -> Expected:
        if not lora_name:
            with self.peft.disable_adapter():
                return self.generate(PROMPTS[prompt_name], MAX_TOKENS)
        self.peft.set_adapter(lora_name)
        return self.generate(PROMPTS[prompt_name], MAX_TOKENS)


def _config(fields: dict[str, Any]) -> LoraConfig:
    return LoraConfig(**{"init_lora_weights": False, **fields})


@dataclass(frozen=True)
class Adapters:
    folders: dict[str, Path]
    expected: dict[tuple[str, str], Expected]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("adapters")
    names = {name: f"adapter{index}" for index, name in enumerate(CONFIGS)}
    model = Adapted({names[name]: fields for name, fields in CONFIGS.items()})
    model.peft.save_pretrained(folder, selected_adapters=list(names.values()))
    expected = {
        (lora_name, prompt): model.answer(names.get(lora_name, ""), prompt)
        for lora_name in ("", *CONFIGS)
        for prompt in NAMES
    }
    return Adapters({name: folder / names[name] for name in CONFIGS}, expected)


@pytest.fixture(scope="module", params=["aggregated", "disaggregated"])
def served(request: pytest.FixtureRequest, adapters: Adapters) -> Iterator[KelpServer]:
    options = tuple(part for name, path in adapters.folders.items() for part in ("--lora", f"{name}={path}"))
    settings = {"executor.max_step_tokens": MAX_STEP_TOKENS}
    with KelpServer(request.param, settings=settings, arguments=options).start() as server:
        yield server


def test_the_reference_is_clear_and_changes_with_the_adapter(adapters: Adapters) -> None:
    assert all(reference.margin > 1e-3 for reference in adapters.expected.values())
    for prompt in NAMES:
        answers = [adapters.expected[name, prompt] for name in ("", *CONFIGS)]
        for first, second in combinations(answers, 2):
            pairs = zip(first.log_probs, second.log_probs, strict=False)
            assert max(abs(one - other) for one, other in pairs) > 1e-2, prompt
        if prompt in ("capital", "chat about code"):
            assert len({tuple(answer.token_ids) for answer in answers}) == len(answers)


def test_adapters_at_once_get_the_reference_s_tokens_and_share_no_blocks(
    served: KelpServer, adapters: Adapters
) -> None:
    def ask(key: tuple[str, str]) -> Answer:
        lora_name, prompt = key
        fields = {"lora_name": lora_name} if lora_name else {}
        return served.ask(**PROMPTS[prompt], **fields, max_tokens=MAX_TOKENS, stream=True, return_log_probs=True)

    for is_cached in (False, True):
        with ThreadPoolExecutor(len(adapters.expected)) as pool:
            answers = dict(zip(adapters.expected, pool.map(ask, adapters.expected), strict=True))
        for key, answer in answers.items():
            reference = adapters.expected[key]
            assert answer.token_ids == reference.token_ids, key
            assert answer.text == reference.text, key
            np.testing.assert_allclose(answer.log_probs, reference.log_probs, atol=1e-3, err_msg=str(key))
            num_reusable_blocks = (len(reference.prompt_ids) - 1) // BLOCK_TOKENS if is_cached else 0
            assert answer.last.number("cached_tokens") == num_reusable_blocks * BLOCK_TOKENS, key
        served.wait_quiet()


def test_an_adapter_may_be_named_as_vllm_s_clients_do(served: KelpServer, adapters: Adapters) -> None:
    document = json.dumps({"lora_name": "attention", "max_tokens": MAX_TOKENS})
    answer = served.ask(**PROMPTS["capital"], sampling_parameters=document)
    assert answer.token_ids == adapters.expected["attention", "capital"].token_ids


def test_an_unknown_adapter_is_refused_with_the_known_ones(served: KelpServer) -> None:
    with pytest.raises(ServedError) as caught:
        served.ask(**PROMPTS["capital"], lora_name="nobody")
    assert caught.value.code == "INVALID_ARGUMENT"
    assert all(word in caught.value.message for word in ("lora_name", "'nobody'", *CONFIGS))
