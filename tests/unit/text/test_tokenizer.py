"""Token ids and special tokens come from the model folder alone."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from kelp.core.errors import ConfigError
from kelp.text.tokenizer import Tokenizer


def _rewrite(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_special_tokens_are_added_as_the_post_processor_says(model_folder, trained_tokenizer):
    tokenizer = Tokenizer(model_folder)
    ids = tokenizer.encode("the dog")
    assert ids.dtype == np.int32
    assert ids[0] == trained_tokenizer.token_to_id("<|begin|>")
    assert tokenizer.encode("the dog", add_special_tokens=False).tolist() == ids[1:].tolist()


def test_special_tokens_give_no_text_and_other_added_tokens_do(model_folder):
    tokenizer = Tokenizer(model_folder)
    assert tokenizer.decode(tokenizer.encode("Grüße <tool>    你好<|im_end|>")) == "Grüße <tool>    你好"


def test_ids_that_stand_for_nothing_give_no_text(model_folder):
    tokenizer = Tokenizer(model_folder)
    assert tokenizer.vocab_size == 512
    assert (tokenizer.decode([511]), tokenizer.piece(511), tokenizer.piece_bytes(511)) == ("", None, b"")


def test_pieces_spell_the_text_byte_by_byte(model_folder):
    tokenizer = Tokenizer(model_folder)
    text = "Grüße <tool>    \n你好 👩‍👩‍👧 \u00ad\x00\x7f"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.piece_bytes(token_id) for token_id in ids.tolist()) == text.encode()


def test_a_truncation_or_padding_left_in_the_file_is_not_applied(model_folder, trained_tokenizer):
    text = "the quick brown fox"
    expected = Tokenizer(model_folder).encode(text).tolist()
    _rewrite(
        model_folder,
        "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|end|>",
        },
    )  # fmt: skip
    assert Tokenizer(model_folder).encode(text).tolist() == expected


def test_end_tokens_come_from_the_generation_config_first(model_folder, trained_tokenizer):
    assert Tokenizer(model_folder).eos_token_ids == (3, 1)
    (model_folder / "generation_config.json").unlink()
    assert Tokenizer(model_folder).eos_token_ids == (1,)
    _rewrite(model_folder, "config.json", eos_token_id=None)
    assert Tokenizer(model_folder).eos_token_ids == (trained_tokenizer.token_to_id("<|im_end|>"),)


def test_the_language_part_of_a_multimodal_config_counts(model_folder):
    (model_folder / "config.json").write_text('{"text_config": {"vocab_size": 777}}')
    assert Tokenizer(model_folder).vocab_size == 777


def test_special_token_texts_may_be_plain_or_objects(model_folder):
    tokenizer = Tokenizer(model_folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|im_end|>")


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model": {"type": "Nonsense"}}'])
def test_a_broken_tokenizer_file_is_a_config_error(model_folder, content):
    (model_folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer(model_folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_setting_file_is_a_config_error_that_names_it(model_folder, name, content):
    (model_folder / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        Tokenizer(model_folder)


def test_a_folder_without_tokenizer_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        Tokenizer(tmp_path)


def test_threads_may_share_one_tokenizer(model_folder):
    tokenizer = Tokenizer(model_folder)
    texts = ["the quick brown fox " * count for count in range(1, 9)]
    expected = [tokenizer.encode(text).tolist() for text in texts]
    found = [None] * len(texts)

    def encode(index):
        for _ in range(20):
            found[index] = tokenizer.encode(texts[index]).tolist()

    threads = [threading.Thread(target=encode, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
