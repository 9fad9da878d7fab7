"""Whatever a text in ASCII is, looking its words up gives what the tokenizer gives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kelp.text.word_cache import WordCache, new_word_cache
from support.word_tokenizers import KNOWN, SPECIAL, merge

PIECES = [*SPECIAL, "'s", "'LL", "'", "  ", "\n", "\r\n", "\t", "\x1f", "\x0b", "12", "a", "Fox", "...", " ", "\x00"]
_ANY = st.text(st.characters(codec="ascii"), max_size=30)
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=20).map("".join),
    st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(["one", "two.", "3", "it's"]), _ANY), max_size=10).map(
        " ".join
    ),
    _ANY,
)


@pytest.fixture(scope="module", params=KNOWN)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, WordCache]:
    tokenizer = KNOWN[request.param]()
    cache = new_word_cache(
        json.loads(tokenizer.to_str()), lambda word: merge(tokenizer, word), lambda text: tokenizer.encode(text).ids
    )
    assert cache is not None
    return tokenizer, cache


@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_ids_are_those_of_the_tokenizer(pair: tuple[Tokenizer, WordCache], text: str) -> None:
    tokenizer, cache = pair
    found = cache.encode(text)
    assert found is not None
    assert found.tolist() == tokenizer.encode(text).ids
