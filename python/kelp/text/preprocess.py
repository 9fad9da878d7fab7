"""From a prompt in any form to token ids, block hashes and everything else that needs the tokenizer.

This is what the model `preprocess` does. Refuses what is empty, too long or outside the vocabulary, so that no
worker sees it. Thread-safe, called from a thread pool. Knows nothing of workers or routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kelp.core.chat_messages import parse_messages
from kelp.core.errors import ConfigError, InvalidRequest, PromptTooLong
from kelp.core.hashing import seed_hash, sequence_hashes
from kelp.core.model_identity import adapter_digest, lora_id, model_identity
from kelp.core.preprocess_messages import Prepared, PreparedPrompt, PreprocessOptions
from kelp.core.request import Prompt
from kelp.core.request_limits import short_repr
from kelp.core.types import SequenceHash
from kelp.text.chat_template import ChatTemplate
from kelp.text.grammar import GrammarCompiler
from kelp.text.model_files import first_positive_int, read_json
from kelp.text.tokenizer import Tokenizer

_MAX_MODELS = 16


@dataclass(frozen=True, slots=True)
class PreprocessLimits:
    """What a prompt may be.

    Attributes:
        max_model_tokens: Prompt plus output; 0 takes the model's own limit, which is never exceeded either way.
        max_prompt_chars: Longest prompt that a chat template may render.
    """

    max_model_tokens: int = 0
    max_prompt_chars: int = 8 * 1024 * 1024


def _max_model_tokens(folder: Path, configured: int) -> int:
    config = read_json(folder, "config.json", is_required=True)
    own = first_positive_int(config, "max_position_embeddings", "n_positions", "max_sequence_length")
    limits = [limit for limit in (own, configured) if limit > 0]
    if not limits:
        raise ConfigError(
            f"model.path={folder}: config.json names no max_position_embeddings, set executor.max_model_tokens"
        )
    return min(limits)


class Preprocessor:
    """Prepares prompts for one model.

    Attributes:
        model_id: `core.model_identity` of the folder.
        max_model_tokens: The limit in force.
    """

    def __init__(
        self,
        model_folder: Path,
        limits: PreprocessLimits | None = None,
        lora_adapters: Mapping[str, Path] | None = None,
    ) -> None:
        """Load tokenizer and template.

        Args:
            model_folder: The model.
            limits: What a prompt may be.
            lora_adapters: PEFT folders by the names that requests may give.

        Raises:
            ConfigError: A folder is not a usable model or adapter.
        """
        limits = limits or PreprocessLimits()
        self.max_model_tokens = _max_model_tokens(model_folder, limits.max_model_tokens)
        self.model_id = model_identity(model_folder)
        self.tokenizer = Tokenizer(model_folder)
        self._template = ChatTemplate(model_folder, limits.max_prompt_chars)
        self._grammars = GrammarCompiler(model_folder, self.tokenizer.vocab_size, self.tokenizer.eos_token_ids)
        self._lora_digests = {name: adapter_digest(folder) for name, folder in (lora_adapters or {}).items()}

    def prepare(self, prompt: Prompt, options: PreprocessOptions) -> PreparedPrompt:
        """Tokenise, check and hash one prompt.

        Raises:
            InvalidRequest: The prompt is empty, the chat template refuses it, a token id is not the model's, there is
                no adapter of that name, or the guide cannot be compiled.
            PromptTooLong: Prompt plus `max_tokens` exceed the limit.
        """
        lora_digest = self._lora_digest(options.lora_name)
        text, ids = self._tokenise(prompt, options)
        self._check_length(prompt.field, len(ids), options.max_tokens)
        for index, token_id in enumerate(options.stop_token_ids):
            if token_id >= self.tokenizer.vocab_size:
                raise InvalidRequest(
                    f"stop_token_ids[{index}] (or end_id): {token_id} given, the vocabulary ends at "
                    f"{self.tokenizer.vocab_size - 1}"
                )
        if options.guide is not None:
            self._grammars.compile(options.guide)
        seed = seed_hash(self.model_id, lora_id(options.lora_name, lora_digest), options.cache_salt)
        return PreparedPrompt(
            input_ids=ids,
            block_hashes=sequence_hashes(ids, options.block_size, seed),
            message=self._message(seed, lora_digest, options),
            prompt_text=text if options.return_prompt_text else "",
        )

    def _message(self, seed: SequenceHash, lora_digest: str, options: PreprocessOptions) -> Prepared:
        if not (options.bad_words or options.lora_name or options.cache_salt):
            return _plain_message(seed, self.model_id)
        return Prepared(
            seed_hash_hex=seed.hex(),
            bad_words_ids=self._bad_words_ids(options.bad_words),
            lora_digest=lora_digest,
            model_id=self.model_id,
        )

    def _lora_digest(self, name: str) -> str:
        if name and name not in self._lora_digests:
            known = ", ".join(self._lora_digests) or "none"
            raise InvalidRequest(f"lora_name: {short_repr(name)} given, this server's adapters: {known}")
        return self._lora_digests.get(name, "")

    def _tokenise(self, prompt: Prompt, options: PreprocessOptions) -> tuple[str, npt.NDArray[np.int32]]:
        if prompt.input_ids is not None:
            ids = np.array(prompt.input_ids, dtype=np.int32)
            self._check_vocabulary(ids)
            return (self.tokenizer.decode(ids.tolist()) if options.return_prompt_text else ""), ids
        if prompt.messages:
            text = self._template.render(parse_messages(prompt.messages))
            add_special_tokens = False
        else:
            text, add_special_tokens = prompt.text, options.add_special_tokens
        least = self.tokenizer.min_num_tokens(text)
        if least > self.max_model_tokens:
            raise PromptTooLong(
                f"{prompt.field}: at least {least} prompt tokens exceed the limit of {self.max_model_tokens} tokens"
            )
        return text, self.tokenizer.encode(text, add_special_tokens)

    def _check_vocabulary(self, ids: npt.NDArray[np.int32]) -> None:
        foreign = np.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size))
        if foreign.size:
            index = int(foreign[0])
            raise InvalidRequest(
                f"input_ids[{index}]: {int(ids[index])} given, must be from 0 to {self.tokenizer.vocab_size - 1}"
            )

    def _check_length(self, field: str, num_tokens: int, max_tokens: int) -> None:
        if num_tokens == 0:
            raise InvalidRequest(f"{field}: the prompt has no tokens")
        if num_tokens + max_tokens > self.max_model_tokens:
            raise PromptTooLong(
                f"{field}: {num_tokens} prompt tokens plus max_tokens={max_tokens} exceed the limit of "
                f"{self.max_model_tokens} tokens"
            )

    def _bad_words_ids(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Every word as it is and with one leading space, because tokens differ at a word's start."""
        with_space = [" " + word.lstrip() for word in words if word.lstrip()]
        spellings = dict.fromkeys((*words, *with_space))
        encoded = (tuple(self.tokenizer.encode(spelling, add_special_tokens=False).tolist()) for spelling in spellings)
        return tuple(dict.fromkeys(ids for ids in encoded if ids))


@lru_cache(_MAX_MODELS)
def _plain_message(seed: SequenceHash, model_id: str) -> Prepared:
    return Prepared(seed_hash_hex=seed.hex(), model_id=model_id)
