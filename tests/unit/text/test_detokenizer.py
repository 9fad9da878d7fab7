"""Deltas never split a character."""

from __future__ import annotations

import pytest

from kelp.text.detokenizer import new_detokenizer
from kelp.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(model_folder):
    return Tokenizer(model_folder)


def test_a_character_appears_with_its_last_byte(tokenizer, trained_tokenizer):
    alphabet = {tokenizer.piece_bytes(token_id): token_id for token_id in range(trained_tokenizer.get_vocab_size())}
    detokenizer = new_detokenizer(tokenizer)
    deltas = [detokenizer.push([alphabet[bytes([byte])]]) for byte in "a👩".encode()]
    assert deltas == ["a", "", "", "", "👩"]


def test_special_tokens_give_no_text(tokenizer, trained_tokenizer):
    ids = [trained_tokenizer.token_to_id(token) for token in ("<|im_start|>", "<tool>", "<|im_end|>")]
    assert new_detokenizer(tokenizer).push(ids) == "<tool>"


def test_an_incomplete_character_at_the_end_is_replaced_on_flush(tokenizer):
    ids = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.piece_bytes(token_id) == b"\xf0"]
    detokenizer = new_detokenizer(tokenizer)
    assert detokenizer.push(ids) == ""
    assert detokenizer.flush() == "\ufffd"
    assert new_detokenizer(tokenizer).flush() == ""


def test_a_replacement_character_that_was_meant_is_not_held_back(tokenizer):
    assert new_detokenizer(tokenizer).push(tokenizer.encode("\ufffd").tolist()) == "\ufffd"


def test_sequences_do_not_share_state(tokenizer):
    ids = tokenizer.encode("👩").tolist()
    first, second = new_detokenizer(tokenizer), new_detokenizer(tokenizer)
    first.push(ids[:-1])
    assert second.push(tokenizer.encode("ok").tolist()) == "ok"
    assert first.push(ids[-1:]) == "👩"
