"""Which prompts the router prepares itself, and which it leaves to the model `preprocess`."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pb_double  # noqa: F401
import pytest

from kelp.core.config import KelpConfig
from kelp.core.guide_spec import GuideSpec
from kelp.core.messages import SamplingParams
from kelp.core.preprocess_messages import Prepared, PreparedPrompt, encode_prepared
from kelp.core.request import LlmRequest, Prompt
from kelp_triton import router_model

PREPARED = PreparedPrompt(np.array([1, 2], dtype=np.int32), [], Prepared(seed_hash_hex="0" * 32))


class Asked:
    """Stands for both ways to a prepared prompt and notes which was taken."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def prepare(self, prompt: object, options: object) -> PreparedPrompt:
        self.taken.append("inline")
        return PREPARED

    async def call(self, inputs: object) -> Any:
        self.taken.append("preprocess")
        return encode_prepared(PREPARED)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()
    monkeypatch.setattr(router_model, "build_preprocessor", lambda config: made)
    monkeypatch.setattr(router_model, "BlsClient", lambda *_: made)
    return made


def prepare(prompt: Prompt, max_chars: int = 8, guide: GuideSpec | None = None) -> PreparedPrompt:
    config = KelpConfig.model_validate({"router": {"inline_prompt_chars": max_chars}})
    request = LlmRequest(prompt, SamplingParams(guide=guide))
    return asyncio.run(router_model.SizedPreprocess(config).prepare(request))


@pytest.mark.parametrize(
    ("prompt", "way"),
    [
        (Prompt(text="12345678"), "inline"),
        (Prompt(text="123456789"), "preprocess"),
        (Prompt(messages="[{}]"), "inline"),
        (Prompt(messages="[{}, {}, {}]"), "preprocess"),
        (Prompt(input_ids=np.arange(2, dtype=np.int32)), "inline"),
        (Prompt(input_ids=np.arange(3, dtype=np.int32)), "preprocess"),
    ],
    ids=["short text", "long text", "short messages", "long messages", "few ids", "many ids"],
)
def test_short_prompts_are_prepared_here_and_long_ones_by_the_model(asked: Asked, prompt: Prompt, way: str) -> None:
    prepared = prepare(prompt)
    assert asked.taken == [way]
    assert list(prepared.input_ids) == [1, 2]


def test_a_guide_is_compiled_elsewhere(asked: Asked) -> None:
    prepare(Prompt(text="1"), guide=GuideSpec.model_validate({"kind": "regex", "text": "a+"}))
    assert asked.taken == ["preprocess"]


def test_without_an_allowance_the_model_prepares_every_prompt(asked: Asked) -> None:
    prepare(Prompt(text="1"), max_chars=0)
    assert asked.taken == ["preprocess"]
