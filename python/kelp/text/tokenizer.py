"""Text to token ids and back, as the model's own tokenizer.json says.

Uses the `tokenizers` library directly, without transformers: the same ids, a tenth of the import time. All
methods may be called from several threads at once. Knows nothing of requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HuggingFaceTokenizer

from kelp.core.errors import ConfigError
from kelp.text.model_files import configured_eos_token_ids, first_positive_int, read_json, special_token
from kelp.text.token_bound import longest_token_bytes
from kelp.text.word_cache import new_word_cache


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + offset): byte for offset, byte in enumerate(others)})
    return alphabet


@lru_cache(maxsize=1)
def _alphabet_of_ascii() -> dict[int, str]:
    return {byte: character for character, byte in _byte_of_character().items() if byte < 0x80}


def _decoder_types(decoder: dict[str, Any] | None) -> list[str]:
    if not decoder:
        return []
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts]


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """`Tokenizer.eos_token_ids` for those who need no tokenizer, and of folders that have none.

    Raises:
        ConfigError: A file that has to be read is malformed.
    """
    configured = configured_eos_token_ids(folder)
    if configured is not None:
        return configured
    return Tokenizer(folder).eos_token_ids if (folder / "tokenizer.json").is_file() else ()


class _Spelled(dict[int, bytes]):
    """Each token's bytes, once they were asked for."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        super().__init__()
        self._spell = spell

    def __missing__(self, token_id: int) -> bytes:
        spelled = self[token_id] = self._spell(token_id)
        return spelled


class Tokenizer:
    """The tokenizer of one model folder.

    Attributes:
        vocab_size: Token ids the *model* knows are below this; some may stand for nothing.
        eos_token_ids: generation_config.json's, else config.json's, else the tokenizer's own.
        bos_token: Text that begins a sequence; empty where the model has none.
        eos_token: Text that ends a sequence; empty where the model has none.
        is_byte_level: Whether every token is a piece of UTF-8, so that `piece` gives exact bytes.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model.path={folder}: tokenizer.json: no such file")
        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        # The library raises bare Exception for everything that is wrong with the file.
        except Exception as error:
            raise ConfigError(f"model.path={folder}: tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = read_json(folder, "tokenizer_config.json")
        self.bos_token = special_token(settings, "bos_token")
        self.eos_token = special_token(settings, "eos_token")
        configured = configured_eos_token_ids(folder)
        self.eos_token_ids = self._own_eos_token_ids() if configured is None else configured
        own_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = first_positive_int(read_json(folder, "config.json"), "vocab_size") or own_size
        self._special_ids = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        document = json.loads(self._tokenizer.to_str())
        self._longest_token_bytes = longest_token_bytes(document)
        self._spelled = _Spelled(self._spell)
        self._words = new_word_cache(document, self._merge, self._encode)
        self._adds_nothing = not self._tokenizer.num_special_tokens_to_add(is_pair=False)
        decoders = _decoder_types(document["decoder"])
        self.is_byte_level = bool(decoders) and set(decoders) <= {"ByteLevel", "Fuse"}
        self.has_byte_fallback = "ByteFallback" in decoders

    def encode(self, text: str, add_special_tokens: bool = True) -> npt.NDArray[np.int32]:
        """Token ids `[num_tokens] int32`, the same as `transformers` gives for `tokenizer(text)`."""
        if self._words is not None and (self._adds_nothing or not add_special_tokens):
            found = self._words.encode(text)
            if found is not None:
                return found
        return np.array(self._encode(text, add_special_tokens), dtype=np.int32)

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        # Unlike `encode`, this one keeps no offsets, a sixth of the time, and lets other threads run meanwhile.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _merge(self, word: str) -> list[int]:
        """Token ids of one word in ASCII, which is not split any further."""
        return [token.id for token in self._tokenizer.model.tokenize(word.translate(_alphabet_of_ascii()))]

    def min_num_tokens(self, text: str) -> int:
        """Tokens that `text` has at least; cheap, and 0 where this tokenizer allows no such bound."""
        if not self._longest_token_bytes:
            return 0
        return len(text.encode()) // self._longest_token_bytes

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of all ids together; special tokens and ids that stand for nothing are left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None for special tokens and ids that stand for nothing."""
        if token_id in self._special_ids:
            return None
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry."""
        token_id: int | None = self._tokenizer.token_to_id(piece)
        return token_id

    def _own_eos_token_ids(self) -> tuple[int, ...]:
        token_id = self.token_id(self.eos_token)
        return () if token_id is None else (token_id,)

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text; only meaningful where `is_byte_level`.

        Added tokens may hold characters outside the alphabet, such as spaces; those are spelled plainly.
        """
        return self._spelled[token_id]

    def text_bytes(self, token_ids: Iterable[int]) -> bytes:
        """The bytes that several tokens add."""
        return b"".join(map(self._spelled.__getitem__, token_ids))

    def _spell(self, token_id: int) -> bytes:
        piece = self.piece(token_id)
        if piece is None:
            return b""
        alphabet = _byte_of_character()
        try:
            return bytes(alphabet[character] for character in piece)
        except KeyError:
            return piece.encode()
