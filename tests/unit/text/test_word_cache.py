"""Which tokenizers, and which texts, looking words up is for."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

from kelp.text.tokenizer import Tokenizer
from kelp.text.word_cache import WordCache, new_word_cache
from support.word_tokenizers import KNOWN, LLAMA3, byte_level, digits, merge, split, trained

OTHERS = {
    "a space in front": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another expression": lambda: trained(split(r"\s+|\S+")),
    "separators dropped": lambda: trained(split(LLAMA3, "removed")),
    "groups of digits": lambda: trained(digits(is_individual=False)),
    "another letter case": lambda: trained(byte_level(), normalizers.Lowercase()),
    "a token that takes white space": lambda: trained(byte_level(), added=[AddedToken("<x>", lstrip=True)]),
    "a token that is looked for later": lambda: trained(byte_level(), added=[AddedToken("<x>", normalized=True)]),
}


class Asked:
    """A cache of a tokenizer, and the words it was asked for."""

    def __init__(self, tokenizer) -> None:
        self.words: list[str] = []

        def ask(word: str) -> list[int]:
            self.words.append(word)
            return merge(tokenizer, word)

        self.cache: WordCache | None = new_word_cache(
            json.loads(tokenizer.to_str()), ask, lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        )
        self.words.clear()


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_that_splits_in_a_way_that_is_not_known_is_left_alone(name):
    assert Asked(OTHERS[name]()).cache is None


@pytest.mark.parametrize("name", KNOWN)
def test_a_word_is_merged_once(name):
    asked = Asked(KNOWN[name]())
    first = asked.cache.encode("zebra zebra crossing")
    assert asked.words == ["zebra", " zebra", " crossing"]
    assert asked.cache.encode("zebra zebra crossing").tolist() == first.tolist()
    assert len(asked.words) == 3


def test_a_very_long_word_is_not_kept():
    asked = Asked(KNOWN["gpt2"]())
    for _ in range(2):
        asked.cache.encode("z" * 65)
    assert asked.words == ["z" * 65] * 2


def test_text_that_is_not_all_ascii_or_very_long_is_for_the_tokenizer():
    cache = Asked(KNOWN["gpt2"]()).cache
    assert cache.encode("Grüße") is None
    assert cache.encode("a " * 8192).size > 0
    assert cache.encode("a " * 8192 + "a") is None


def test_a_cache_that_says_something_else_than_its_tokenizer_is_not_used():
    tokenizer = KNOWN["gpt2"]()
    document = json.loads(tokenizer.to_str())
    assert new_word_cache(document, lambda word: merge(tokenizer, word), lambda _: [1, 2, 3]) is None


def test_a_model_says_the_same_with_and_without_its_template_whoever_finds_the_words(model_folder, trained_tokenizer):
    document = json.loads(trained_tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["special"]]
    (model_folder / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = Tokenizer(model_folder)
    plain = tokenizer.encode("<|im_start|>the quick dog", add_special_tokens=False).tolist()
    assert tokenizer.encode("<|im_start|>the quick dog").tolist() == [0, *plain]
    assert tokenizer.decode(plain) == "the quick dog"
