"""Rebuilds a Hugging Face tokenizer from the metadata of a GGUF file.

A GGUF holds vocabulary, merges and the *name* of a pre-tokenizer; the rules behind that name are llama.cpp's and
are repeated here. Splitting text differently from the way a model was trained gives plausible but worse answers, so
an unknown name is refused instead of guessed; the model's own tokenizer.json may then stand in. Knows nothing of
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kelp.core.errors import ConfigError

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_INSTEAD = "put the model's own tokenizer.json beside the file, or use its Hugging Face folder"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Rules:
    """What one value of `tokenizer.ggml.pre` stands for."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    is_nfc: bool = False


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _split(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level(use_regex=False)]
    )


_RULES: Mapping[str, _Rules] = {
    "gpt-2": _Rules(_byte_level),
    "smollm": _Rules(_digits),
    "llama-bpe": _Rules(_split(_LLAMA3_SPLIT), ignore_merges=True),
    "qwen2": _Rules(_split(_QWEN2_SPLIT), is_nfc=True),
}


def _require(metadata: Mapping[str, Any], field: str) -> Any:
    if field not in metadata:
        raise ConfigError(f"{field}: missing in the GGUF metadata")
    return metadata[field]


def _rules(metadata: Mapping[str, Any]) -> _Rules:
    model = _require(metadata, "tokenizer.ggml.model")
    if model != "gpt2":
        raise ConfigError(f"tokenizer.ggml.model: {model!r} is not supported (byte-level BPE 'gpt2' only); {_INSTEAD}")
    name = _require(metadata, "tokenizer.ggml.pre")
    if name not in _RULES:
        raise ConfigError(f"tokenizer.ggml.pre: {name!r} is not one of {', '.join(sorted(_RULES))}; {_INSTEAD}")
    return _RULES[name]


def _added_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> list[AddedToken]:
    types = _require(metadata, "tokenizer.ggml.token_type")
    return [
        AddedToken(token, special=token_type == _CONTROL, normalized=False)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (_CONTROL, _USER_DEFINED)
    ]


def special_token(metadata: Mapping[str, Any], role: str) -> str | None:
    """Text of the token that the file gives a role (`bos`, `eos`, `unknown`, `padding`), if any."""
    token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return None if token_id is None else str(metadata["tokenizer.ggml.tokens"][token_id])


def _post_processor(metadata: Mapping[str, Any]) -> processors.PostProcessor:
    bos = special_token(metadata, "bos")
    if not metadata.get("tokenizer.ggml.add_bos_token", False) or bos is None:
        return processors.ByteLevel(trim_offsets=False)
    return processors.TemplateProcessing(
        single=[bos, "$A"],
        pair=[bos, "$A", bos, "$B:1"],
        special_tokens=[(bos, int(metadata["tokenizer.ggml.bos_token_id"]))],
    )


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Make the tokenizer that a GGUF file describes.

    Args:
        metadata: GGUF keys and their values; arrays as Python lists.

    Raises:
        ConfigError: A field is missing or names rules that are not known here; names the field.
    """
    rules = _rules(metadata)
    tokens = [str(token) for token in _require(metadata, "tokenizer.ggml.tokens")]
    merges = []
    for merge in _require(metadata, "tokenizer.ggml.merges"):
        left, _, right = str(merge).partition(" ")
        merges.append((left, right))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rules.ignore_merges))
    if rules.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rules.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata)
    tokenizer.add_tokens(_added_tokens(metadata, tokens))
    return tokenizer


def adopt_tokenizer(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Take a tokenizer.json for the one that a GGUF file describes.

    Args:
        path: The tokenizer.json.
        metadata: As for `build_tokenizer`.

    Raises:
        ConfigError: It is not readable, or gives a token of the GGUF file's vocabulary another text.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The library raises bare Exception for everything that is wrong with the file.
    except Exception as error:
        raise ConfigError(f"{path}: {error}") from None
    tokens, types = _require(metadata, "tokenizer.ggml.tokens"), _require(metadata, "tokenizer.ggml.token_type")
    for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        found = tokenizer.id_to_token(token_id)
        if token_type in (_NORMAL, _BYTE) and found != token:
            raise ConfigError(f"{path}: token {token_id} is {found!r}, tokenizer.ggml.tokens says {token!r}")
    return tokenizer


def tokenizer_settings(metadata: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """Content of tokenizer_config.json: roles of tokens, chat template, context length."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "bos_token": special_token(metadata, "bos"),
        "eos_token": special_token(metadata, "eos"),
        "unk_token": special_token(metadata, "unknown"),
        "pad_token": special_token(metadata, "padding"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    return {key: value for key, value in settings.items() if value is not None}
