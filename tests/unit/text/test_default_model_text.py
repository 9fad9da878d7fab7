"""On the default model, ids and prompts equal those of transformers."""

from __future__ import annotations

import json

import pytest

from kelp.core.config import ModelConfig
from kelp.core.preprocess_messages import PreprocessOptions
from kelp.core.request import Prompt
from kelp.text.chat_template import ChatTemplate
from kelp.text.detokenizer import new_detokenizer
from kelp.text.preprocess import Preprocessor

FOLDER = ModelConfig().path
pytestmark = pytest.mark.skipif(
    not (FOLDER / "tokenizer.json").is_file(), reason=f"no default model in {FOLDER}: run make setup"
)

TEXTS = [
    "What is the capital of France?",
    "  leading and trailing spaces  ",
    "Grüße aus Köln, São Paulo und Łódź!",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "Привет, мир! Γειά σου Κόσμε! مرحبا بالعالم שלום",
    "नमस्ते दुनिया 안녕하세요 세계",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 \u200d",
    "def f(x):\n\n    return x ** 2  # 12345.678\t\r\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "a" * 1000,
    "\x00\x7f\u00ad\ufffd",
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Réponds en français."}, {"role": "user", "content": "Hi {{ 1 }} <b>"}],
    [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二 "},
        {"role": "user", "content": "\n三\n"},
    ],
]


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(FOLDER))


@pytest.fixture(scope="module")
def preprocessor():
    return Preprocessor(FOLDER)


@pytest.mark.parametrize("text", TEXTS)
def test_raw_text_has_the_ids_of_transformers(preprocessor, reference, text):
    prepared = preprocessor.prepare(Prompt(text=text), PreprocessOptions(block_size=16, max_tokens=1))
    assert prepared.input_ids.tolist() == reference(text)["input_ids"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations_have_the_text_and_ids_of_transformers(preprocessor, reference, messages):
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(FOLDER, 10_000).render(messages) == expected
    options = PreprocessOptions(block_size=16, max_tokens=1)
    prepared = preprocessor.prepare(Prompt(messages=json.dumps(messages)), options)
    assert prepared.input_ids.tolist() == reference(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_by_token_deltas_add_up_to_the_decode_of_transformers(preprocessor, reference, text):
    ids = reference(text)["input_ids"]
    detokenizer = new_detokenizer(preprocessor.tokenizer)
    streamed = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.flush()
    assert streamed == reference.decode(ids, skip_special_tokens=True)


def test_special_token_ids_are_those_of_transformers(preprocessor, reference):
    tokenizer = preprocessor.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == (reference.bos_token, reference.eos_token)
    assert reference.eos_token_id in tokenizer.eos_token_ids
