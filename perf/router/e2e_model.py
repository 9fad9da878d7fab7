"""A model folder without weights, for servers whose engine is a mock, and prompts of a known length for it.

The byte-level BPE is trained on the sources of Python's standard library, so nothing is downloaded, and both servers
under test tokenise with the same file.
"""

from __future__ import annotations

import json
import random
import sysconfig
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from perf.machine import REPOSITORY

FOLDER = REPOSITORY / "perf" / "peers" / "tiny-llama"
TEMPLATE_TOKENS = 10
"""What the chat template adds to one user message."""

_VOCAB_SIZE = 8192
_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MAX_TOKENS = 131072


def _sources() -> list[Path]:
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def _documents(vocab_size: int) -> dict[str, dict[str, object]]:
    added = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate(_SPECIAL)
    }
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _SPECIAL[0],
            "eos_token": _SPECIAL[3],
            "model_max_length": _MAX_TOKENS,
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": added,
        },
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": _MAX_TOKENS,
            "vocab_size": vocab_size,
            "bos_token_id": 0,
            "eos_token_id": 3,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        },
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": [3]},
    }


def build(folder: Path = FOLDER) -> Path:
    """Make the folder unless it is there; it appears at once and complete."""
    if folder.is_dir():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in _sources()], trainer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as work:
        fresh = Path(work) / "fresh"
        fresh.mkdir()
        tokenizer.save(str(fresh / "tokenizer.json"))
        for name, document in _documents(tokenizer.get_vocab_size()).items():
            (fresh / name).write_text(json.dumps(document, indent=1))
        # A safetensors file without tensors: `kelp serve` refuses a folder that has none.
        (fresh / "model.safetensors").write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
        fresh.rename(folder)
    return folder


class Prompts:
    """Never the same prompt twice: slices of source text of a given length in tokens, to within a few."""

    def __init__(self, folder: Path, num_tokens: int, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "".join(path.read_text(errors="ignore") for path in _sources()[:60])
        self._ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        self._num_tokens = num_tokens - TEMPLATE_TOKENS
        self._random = random.Random(seed)

    def take(self, count: int) -> tuple[str, ...]:
        """The next prompts."""
        starts = [self._random.randrange(len(self._ids) - self._num_tokens) for _ in range(count)]
        return tuple(self._tokenizer.decode(self._ids[start : start + self._num_tokens]) for start in starts)
