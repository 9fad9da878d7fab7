"""A tiny byte-level model folder, trained on the spot, so that no download is needed."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Then the dog sleeps in the sun.",
    "Der schnelle braune Fuchs springt über den faulen Hund. Grüße aus Köln!",
    "素早い茶色の狐がのろまな犬を飛び越える。 你好，世界！",
    "for index in range(10):\n    print(index, 'lines', end='\\n\\n')",
]
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
    "        {{- raise_exception('unknown role') }}\n"
    "    {%- endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": {"content": "<|im_end|>", "special": True},
    "chat_template": CHAT_TEMPLATE,
}
MAX_POSITIONS = 128


def write_json(folder, name, document):
    (folder / name).write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture(scope="session")
def trained_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("    ", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


@pytest.fixture
def model_folder(tmp_path, trained_tokenizer):
    trained_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, "tokenizer_config.json", TOKENIZER_SETTINGS)
    write_json(
        tmp_path,
        "config.json",
        {"vocab_size": 512, "max_position_embeddings": MAX_POSITIONS, "eos_token_id": 1},
    )
    write_json(tmp_path, "generation_config.json", {"eos_token_id": [3, 1]})
    return tmp_path
