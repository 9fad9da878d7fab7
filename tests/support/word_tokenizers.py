"""Small byte-level tokenizers that split text into words in one way or another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = ("<|im|>", "<|im|>s")
_CORPUS = ["The quick brown fox isn't 1234 years old.\n\n  for index in range(10):\n    print('it's')  \r\n end?!"] * 2


def byte_level(use_regex: bool = True) -> Any:
    """As it is in most models, without a space in front."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern: str, behavior: str = "isolated") -> Any:
    """By an expression of the model's own."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), byte_level(use_regex=False)])


def digits(is_individual: bool) -> Any:
    """Digits first."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=is_individual), byte_level()])


def trained(pre_tokenizer: Any, normalizer: Any = None, added: Sequence[AddedToken] = ()) -> Tokenizer:
    """A BPE over a few words, with `SPECIAL`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def merge(tokenizer: Tokenizer, word: str) -> list[int]:
    """Ids of one word, not split any further."""
    ((spelled, _),) = byte_level(use_regex=False).pre_tokenize_str(word)
    return [token.id for token in tokenizer.model.tokenize(spelled)]


KNOWN: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: trained(byte_level()),
    "smollm2": lambda: trained(digits(is_individual=True)),
    "llama3": lambda: trained(split(LLAMA3)),
    "qwen2": lambda: trained(split(LLAMA3.replace("{1,3}", "")), normalizers.NFC()),
}
"""By the family that splits so."""
