"""What is asked: requests drawn from a seed, each with the tokens that are right, and those that must be refused."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from kelp.chaos.faults import Phase
from kelp.chaos.verdict import Expectation
from kelp.client.grpc.llm import FieldValue
from kelp.core.messages import SamplingParams
from kelp.executor.mock.language import Vocabulary
from kelp.text.tokenizer import Tokenizer

_WORDS = (
    *("harbour", "keeper", "barrel", "salt", "lantern", "tide", "captain", "ledger", "rope", "signal", "gull"),
    *("cook", "winter", "letter", "bell", "stone", "window", "market", "silver", "garden", "bridge", "road"),
    *("teacher", "island", "paper", "music", "engine", "river"),
)
_SENTENCE_WORDS = 9
_NUM_DOCUMENTS = 6
_DOCUMENT_SENTENCES = 24
_OUTPUT_TOKENS = (4, 16, 40, 80)
DEADLINE_S = 30.0
_TOO_SHORT_S = (0.001, 0.4)
_LEAVE_TOKENS = 5
_MS = 1e3
_SALTED_SHARE, _AGAIN_SHARE = 0.5, 0.1
_MAX_REMEMBERED = 160
"""Long enough ago for workers' pools to have lost the first of them, and near enough for lower tiers to have them."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request and what must become of it.

    Attributes:
        num_sequences: Answers to the one prompt, sampled with seeds that follow each other.
        leaves_after_s: Its client goes after so long,
        leaves_after_tokens: or after so many tokens, whichever comes first.
        refused: Fields of a request that must be refused, instead of all the others.
    """

    prompt: str
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    num_sequences: int = 1
    salt: str = ""
    deadline_s: float = DEADLINE_S
    expectation: Expectation = Expectation.ANSWER
    leaves_after_s: float | None = None
    leaves_after_tokens: int | None = None
    refused: tuple[tuple[str, FieldValue], ...] = ()

    def fields(self, left_s: float) -> dict[str, FieldValue]:
        """Inputs of `llm`, with so much time left until the deadline."""
        if self.refused:
            return {"stream": True, **dict(self.refused)}
        return {
            "text_input": self.prompt,
            "max_tokens": self.max_tokens,
            "stream": True,
            "ignore_eos": True,
            "temperature": self.sampling.temperature,
            "random_seed": self.sampling.seed,
            "num_return_sequences": self.num_sequences,
            "cache_salt": self.salt,
            "deadline_ms": max(1, int(left_s * _MS)),
        }


class Reference(Protocol):
    """Knows the right tokens."""

    def answer(self, question: Question) -> tuple[tuple[int, ...], ...]:
        """All tokens of each of the question's sequences."""


class MockReference:
    """What mock workers say; see `executor.mock.language`."""

    def __init__(self, model_folder: Path) -> None:
        self._tokenizer = Tokenizer(model_folder)
        self._vocabulary = Vocabulary(self._tokenizer.vocab_size, tuple(sorted(self._tokenizer.eos_token_ids)))

    def answer(self, question: Question) -> tuple[tuple[int, ...], ...]:
        """See `Reference`."""
        prompt: list[int] = np.asarray(self._tokenizer.encode(question.prompt), np.int32).tolist()
        seeds = (question.sampling.seed + index for index in range(question.num_sequences))
        return tuple(
            tuple(
                self._vocabulary.continuation(
                    prompt, question.max_tokens, question.sampling.model_copy(update={"seed": seed})
                )
            )
            for seed in seeds
        )


_Key = tuple[str, int, float, int, int]


class RecordedReference:
    """What the fleet itself said before anything happened to it: no fault may change that."""

    def __init__(self) -> None:
        self._answers: dict[_Key, tuple[tuple[int, ...], ...]] = {}

    def record(self, question: Question, tokens: Sequence[Sequence[int]]) -> None:
        """Keep what was said undisturbed."""
        self._answers[_key(question)] = tuple(tuple(sequence) for sequence in tokens)

    def answer(self, question: Question) -> tuple[tuple[int, ...], ...]:
        """See `Reference`; KeyError for a question that was not recorded."""
        return self._answers[_key(question)]


def _key(question: Question) -> _Key:
    sampling = question.sampling
    return question.prompt, question.max_tokens, sampling.temperature, sampling.seed, question.num_sequences


class Questions:
    """An endless supply over a pool of prompts; equal seeds ask the same in the same order.

    Args:
        pool_size: Different questions.
        deadline_s: Of those that are to be answered.
    """

    def __init__(self, seed: int, pool_size: int, deadline_s: float = DEADLINE_S) -> None:
        self._rng = random.Random(seed)
        self._deadline_s = deadline_s
        self._num_salts = 0
        self._asked: deque[Question] = deque(maxlen=_MAX_REMEMBERED)
        documents = [self._text(_DOCUMENT_SENTENCES) for _ in range(_NUM_DOCUMENTS)]
        self.pool = tuple(self._make(documents) for _ in range(pool_size))

    def next(self) -> Question:
        """A question that is to be answered; nearly half find nothing in any cache, some lie in a lower tier alone."""
        question, drawn = self._rng.choice(self.pool), self._rng.random()
        if drawn < _AGAIN_SHARE and self._asked:
            return self._asked[0]
        if drawn > _SALTED_SHARE:
            return question
        salted = self._salted(question)
        self._asked.append(salted)
        return salted

    def asked_before(self, count: int) -> list[Question]:
        """Some of those that were asked once, and long ago, as far as memory goes back; none of the shorter prompts."""
        asked = list(self._asked)[: max(count, len(self._asked) // 2)]
        longest = sorted(asked, key=lambda question: -len(question.prompt))[: max(count, len(asked) // 2)]
        return self._rng.sample(longest, min(count, len(longest)))

    def leaving(self, phase: Phase) -> Question:
        """A question whose client goes in a phase, as near as a client can tell."""
        question = replace(self._salted(self._longest()), expectation=Expectation.LEAVES)
        if phase is Phase.DECODING:
            return replace(question, leaves_after_tokens=_LEAVE_TOKENS)
        if phase is Phase.TRANSFERRING:
            return replace(question, leaves_after_tokens=1)
        latest_s = 0.02 if phase is Phase.QUEUED else 0.2
        return replace(question, leaves_after_s=self._rng.uniform(0.0, latest_s))

    def hurried(self) -> Question:
        """A question with less time than it takes, or little more."""
        deadline_s = self._rng.uniform(*_TOO_SHORT_S)
        return replace(self._salted(self._longest()), expectation=Expectation.DEADLINE, deadline_s=deadline_s)

    def bad(self) -> list[Question]:
        """One of each kind of bad input, in another order each time."""
        made = [
            replace(self.pool[0], expectation=Expectation.REFUSAL, refused=tuple(fields.items()))
            for fields in _BAD_INPUTS
        ]
        self._rng.shuffle(made)
        return made

    def _longest(self) -> Question:
        return max(self._rng.sample(self.pool, 4), key=lambda question: question.max_tokens + len(question.prompt))

    def _salted(self, question: Question) -> Question:
        self._num_salts += 1
        return replace(question, salt=f"salt {self._num_salts}")

    def _make(self, documents: Sequence[str]) -> Question:
        prompt = self._rng.choice(documents) if self._rng.random() < 0.6 else ""
        prompt += self._text(self._rng.randint(1, 4))
        sampling, num_sequences = SamplingParams(), 1
        if self._rng.random() < 0.3:
            sampling = SamplingParams(temperature=1.0, seed=self._rng.randrange(2**32))
            num_sequences = 2 if self._rng.random() < 0.3 else 1
        num_tokens = self._rng.choice(_OUTPUT_TOKENS)
        return Question(prompt, num_tokens, sampling, num_sequences, deadline_s=self._deadline_s)

    def _text(self, num_sentences: int) -> str:
        sentences = (" ".join(self._rng.choices(_WORDS, k=_SENTENCE_WORDS)) for _ in range(num_sentences))
        return "".join(f"{sentence.capitalize()}. " for sentence in sentences)


_TEXT: dict[str, FieldValue] = {"text_input": "The capital of France is"}
_BAD_INPUTS: tuple[dict[str, FieldValue], ...] = (
    {"text_input": ""},
    {"text_input": b"\xff\xfe"},
    {"messages": "{"},
    {"messages": '[{"role": "user"}]'},
    {**_TEXT, "messages": '[{"role": "user", "content": "Hi"}]'},
    {"input_ids": [-1]},
    {"input_ids": [10, 2_000_000_000]},
    {"text_input": "word " * 9000},
    {**_TEXT, "max_tokens": 0},
    {**_TEXT, "max_tokens": 10_000_000},
    {**_TEXT, "max_tokens": [8, 9]},
    {**_TEXT, "min_tokens": 9, "max_tokens": 4},
    {**_TEXT, "temperature": -0.5},
    {**_TEXT, "temperature": float("nan")},
    {**_TEXT, "top_p": 1.5},
    {**_TEXT, "top_k": -7},
    {**_TEXT, "repetition_penalty": 0.0},
    {**_TEXT, "deadline_ms": 0},
    {**_TEXT, "stop_words": ["x"] * 1000},
    {**_TEXT, "sampling_parameters": "not json"},
    {**_TEXT, "sampling_parameters": '{"temprature": 1}'},
    {**_TEXT, "num_return_sequences": 100_000},
    {**_TEXT, "beam_width": 4},
    {**_TEXT, "lora_name": "nobody"},
    {**_TEXT, "guided_decoding_guide_type": "regex"},
    {**_TEXT, "image": b"png"},
    {**_TEXT, "guided_decoding_guide_type": "regex", "guided_decoding_guide": "(" * 500},
)
