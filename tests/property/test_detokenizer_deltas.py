"""Deltas add up to the text, whatever the tokens and however they are grouped."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kelp.text.detokenizer import new_detokenizer
from kelp.text.tokenizer import Tokenizer as KelpTokenizer

TEXTS = [
    "The quick brown fox",
    "Grüße aus Köln",
    "素早い茶色の狐",
    "שלום עולם",
    "नमस्ते दुनिया",
    "print('a')\n\n    x = 1",
]
SPECIAL = AddedToken("<|end|>", special=True)
UNICODE = st.text(st.characters(codec="utf-8"), max_size=30)
EMOJI = st.lists(
    st.sampled_from(["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "é", "e\u0301", "\u200d", "한", " ", "a"]), max_size=12
).map("".join)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentencepiece_like() -> Tokenizer:
    """Llama 2's shape: U+2581 for spaces, byte fallback, one leading space stripped."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [chr(code) for code in range(0x21, 0x7F)] + ["▁", "▁▁", "▁T", "▁qu", "ic", "ü", "▁ü"]
    pairs = [("▁", "▁"), ("▁", "T"), ("▁", "q"), ("i", "c"), ("▁", "ü")]
    pieces.append("▁q")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)}, merges=pairs, byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _word_pieces() -> Tokenizer:
    pieces = ["[UNK]", "the", "dog", "##s", "##ly", "sun", "a", "##b"]
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: index for index, piece in enumerate(pieces)}))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def _saved(tokenizer: Tokenizer, folder) -> KelpTokenizer:
    tokenizer.add_special_tokens([SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return KelpTokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return _saved(_byte_level(), tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory):
    return _saved(_sentencepiece_like(), tmp_path_factory.mktemp("sentencepiece-like"))


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory):
    return _saved(_word_pieces(), tmp_path_factory.mktemp("word-pieces"))


def _deltas(tokenizer, token_ids, sizes):
    detokenizer = new_detokenizer(tokenizer)
    deltas, rest = [], list(token_ids)
    while rest:
        size = sizes[len(deltas) % len(sizes)]
        deltas.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    return [*deltas, detokenizer.flush()]


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sizes=SIZES)
def test_any_byte_level_tokens_add_up_to_the_whole_decode(byte_level, data, sizes):
    token_ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=40))
    assert "".join(_deltas(byte_level, token_ids, sizes)) == byte_level.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=40), sizes=SIZES)
def test_any_bytes_add_up_to_the_whole_decode(byte_level, raw, sizes):
    by_bytes = {byte_level.piece_bytes(token_id): token_id for token_id in range(byte_level.vocab_size)}
    token_ids = [by_bytes[bytes([byte])] for byte in raw]
    whole = byte_level.decode(token_ids)
    assert "".join(_deltas(byte_level, token_ids, sizes)) == whole == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
@settings(max_examples=200, deadline=None)
@given(text=UNICODE | EMOJI, sizes=SIZES)
def test_text_survives_and_no_delta_splits_a_character(request, kind, text, sizes):
    tokenizer = request.getfixturevalue(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False).tolist()
    deltas = _deltas(tokenizer, token_ids, sizes)
    assert "".join(deltas) == tokenizer.decode(token_ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sizes=SIZES)
def test_any_sentencepiece_tokens_whose_bytes_are_sound_add_up_to_the_whole_decode(sentencepiece_like, data, sizes):
    """Where a byte run is broken, the whole decode also loses the sound characters next to it; deltas do not."""
    token_ids = data.draw(
        st.lists(st.integers(0, 0x7F) | st.integers(256, sentencepiece_like.vocab_size + 2), max_size=30)
    )
    assert "".join(_deltas(sentencepiece_like, token_ids, sizes)) == sentencepiece_like.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sizes=SIZES)
def test_the_grouping_of_tokens_does_not_matter(sentencepiece_like, data, sizes):
    token_ids = data.draw(st.lists(st.integers(0, sentencepiece_like.vocab_size + 2), max_size=30))
    one_by_one = _deltas(sentencepiece_like, token_ids, [1])
    assert "".join(_deltas(sentencepiece_like, token_ids, sizes)) == "".join(one_by_one)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sizes=SIZES)
def test_word_pieces_add_up_to_the_whole_decode(word_pieces, data, sizes):
    token_ids = data.draw(st.lists(st.integers(0, word_pieces.vocab_size + 2), max_size=20))
    assert "".join(_deltas(word_pieces, token_ids, sizes)) == word_pieces.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(text=UNICODE | EMOJI | st.text("a the", max_size=60))
def test_a_text_never_has_fewer_tokens_than_the_bound_says(byte_level, text):
    assert byte_level.min_num_tokens(text) <= len(byte_level.encode(text))


def test_a_tokenizer_that_may_lose_text_has_no_bound(sentencepiece_like, word_pieces):
    assert sentencepiece_like.min_num_tokens("a" * 1000) == word_pieces.min_num_tokens("a" * 1000) == 0
    assert word_pieces.encode("a " * 1000).size == 1
