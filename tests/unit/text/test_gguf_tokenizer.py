from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kelp.core.errors import ConfigError
from kelp.text.gguf_tokenizer import adopt_tokenizer, build_tokenizer, special_token, tokenizer_settings


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(256)]


def _metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    tokens = ["<|end|>", "<tool>", *_byte_alphabet(), "ab", "abc", "12", "ĠĠ"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 4, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": ["a b", "ab c", "1 2", "Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    return {**metadata, **changes}


def _tokens(metadata: dict[str, Any], text: str) -> list[str]:
    return list(build_tokenizer(metadata).encode(text).tokens)


def test_merges_are_applied_in_the_order_of_the_file() -> None:
    assert _tokens(_metadata(), "abcab") == ["abc", "ab"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [("gpt-2", ["12"]), ("llama-bpe", ["12"]), ("smollm", ["1", "2"]), ("qwen2", ["1", "2"])],
)
def test_digits_are_split_as_the_named_pre_tokenizer_says(pre: str, expected: list[str]) -> None:
    assert _tokens(_metadata(pre), "12") == expected


def test_llama_bpe_takes_a_whole_word_of_the_vocabulary_without_merging() -> None:
    without_merges = {"tokenizer.ggml.merges": ["x y"]}
    tokens = [*_metadata()["tokenizer.ggml.tokens"], "xy"]
    types = [*_metadata()["tokenizer.ggml.token_type"], 1]
    vocabulary = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert _tokens(_metadata("llama-bpe", **without_merges, **vocabulary), "abc") == ["abc"]
    assert _tokens(_metadata("gpt-2", **without_merges, **vocabulary), "abc") == ["a", "b", "c"]


def test_qwen2_composes_characters_first() -> None:
    decomposed = "e\u0301"
    assert (
        build_tokenizer(_metadata("qwen2")).encode(decomposed).ids == build_tokenizer(_metadata()).encode("\u00e9").ids
    )


@pytest.mark.parametrize("text", ["Grüße, 日本語 👩‍👩‍👧\n\n\tabc  12", " leading", "", "Привет мир", "it's"])
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_decoding_gives_the_text_back(pre: str, text: str) -> None:
    tokenizer = build_tokenizer(_metadata(pre))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_are_whole_and_special_and_user_tokens_are_whole_only() -> None:
    tokenizer = build_tokenizer(_metadata())
    ids = tokenizer.encode("ab<|end|><tool>").ids
    assert ids[1:] == [0, 1]
    assert tokenizer.decode(ids) == "ab<tool>"


def test_a_beginning_token_is_added_only_when_the_file_says_so() -> None:
    assert _tokens(_metadata(**{"tokenizer.ggml.add_bos_token": True}), "ab") == ["<|end|>", "ab"]
    assert _tokens(_metadata(**{"tokenizer.ggml.add_bos_token": False}), "ab") == ["ab"]


@pytest.mark.parametrize(("field", "value"), [("tokenizer.ggml.pre", "mystery"), ("tokenizer.ggml.model", "llama")])
def test_unknown_rules_are_refused_by_field_and_value(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: '{value}'"):
        build_tokenizer(_metadata(**{field: value}))


@pytest.mark.parametrize("field", ["tokens", "merges", "token_type", "pre", "model"])
def test_a_missing_field_is_named(field: str) -> None:
    metadata = _metadata()
    del metadata[f"tokenizer.ggml.{field}"]
    with pytest.raises(ConfigError, match=f"tokenizer.ggml.{field}: missing"):
        build_tokenizer(metadata)


def test_settings_carry_roles_template_and_length_and_leave_out_what_the_file_lacks() -> None:
    settings = tokenizer_settings(_metadata(**{"tokenizer.chat_template": "{{ x }}"}), max_tokens=128)
    assert settings["eos_token"] == "<|end|>"
    assert settings["chat_template"] == "{{ x }}"
    assert settings["model_max_length"] == 128
    assert "pad_token" not in settings
    assert special_token(_metadata(), "padding") is None


def test_a_tokenizer_json_is_adopted_if_it_has_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build_tokenizer(_metadata("smollm")).save(str(path))
    assert adopt_tokenizer(path, _metadata("mystery")).encode("12").tokens == ["1", "2"]


def test_a_tokenizer_json_of_another_model_is_refused_by_the_first_token_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    build_tokenizer(_metadata()).save(str(path))
    tokens = [*_metadata()["tokenizer.ggml.tokens"][:-1], "other"]
    with pytest.raises(ConfigError, match=f"token {len(tokens) - 1} is 'ĠĠ', tokenizer.ggml.tokens says 'other'"):
        adopt_tokenizer(path, _metadata(**{"tokenizer.ggml.tokens": tokens}))


def test_a_broken_tokenizer_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="tokenizer.json"):
        adopt_tokenizer(path, _metadata())
