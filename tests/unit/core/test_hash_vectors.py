"""Names fixed by vectors: ours, and Dynamo's as its own library gave them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kelp.core.hashing import (
    MediaSpan,
    child_hash,
    dynamo_local_hashes,
    dynamo_sequence_hashes,
    seed_hash,
    sequence_hashes,
)

_VECTORS = json.loads((Path(__file__).parent / "hash_vectors.json").read_text())
_TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=48)
_SALTS = st.text(max_size=12)


@pytest.mark.parametrize("vector", _VECTORS["kelp"])
def test_our_names_never_change(vector):
    seed = seed_hash(vector["model_id"], vector["lora_id"], vector["cache_salt"])
    media = [MediaSpan(start, num_tokens, bytes.fromhex(digest)) for start, num_tokens, digest in vector["media"]]
    names = sequence_hashes(vector["tokens"], vector["block_size"], seed, media)
    assert [name.hex() for name in names] == vector["sequence"]


def test_no_two_vectors_of_ours_share_a_name():
    names = [name for vector in _VECTORS["kelp"] for name in vector["sequence"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("vector", _VECTORS["dynamo"])
def test_dynamos_blocks_have_the_names_that_dynamo_gives_them(vector):
    local = dynamo_local_hashes(
        vector["tokens"], vector["block_size"], vector["lora_name"], vector["cache_salt"], vector["media"]
    )
    assert local == vector["local"]
    assert dynamo_sequence_hashes(local) == vector["sequence"]


def test_dynamos_names_of_no_tokens_are_none():
    assert dynamo_local_hashes([], 16) == []
    assert dynamo_sequence_hashes([]) == []


@given(_TOKENS, _SALTS, _SALTS)
def test_equal_tokens_under_different_salts_never_share_a_name(tokens, salt, other):
    names = set(sequence_hashes(tokens, 4, seed_hash("m", "", salt)))
    others = set(sequence_hashes(tokens, 4, seed_hash("m", "", other)))
    assert names == others if salt == other else names.isdisjoint(others)


@given(_TOKENS, st.binary(min_size=1, max_size=8), st.binary(min_size=1, max_size=8))
def test_a_block_is_named_by_the_content_of_its_media(tokens, content, other):
    seed = seed_hash("m")
    span, changed = MediaSpan(4, 4, content), MediaSpan(4, 4, other)
    plain, names = sequence_hashes(tokens, 4, seed), sequence_hashes(tokens, 4, seed, [span])
    assert names[0] == plain[0]
    assert set(names[1:]).isdisjoint(plain)
    assert (sequence_hashes(tokens, 4, seed, [changed]) == names) == (content == other)


def test_different_parts_of_a_media_item_have_different_names():
    seed = seed_hash("m")
    first = sequence_hashes([7] * 4, 4, seed, [MediaSpan(0, 8, b"a")])
    second = sequence_hashes([7] * 4, 4, seed, [MediaSpan(-4, 8, b"a")])
    assert first != second


@given(st.binary(max_size=24), st.lists(st.integers(0, 2**31 - 1), max_size=6))
def test_what_the_tokens_do_not_tell_is_never_taken_for_tokens(extra, tokens):
    plain = child_hash(seed_hash("m"), [int.from_bytes(extra[:3], "little"), *tokens])
    assert child_hash(seed_hash("m"), tokens, extra) != plain
