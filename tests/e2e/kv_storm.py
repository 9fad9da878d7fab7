"""Sixteen clients at once whose prompts share beginnings and fit into no tier but the last; every answer is known."""

from __future__ import annotations

import copy
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from prompts import long_text

from support.serving import KelpServer

MAX_TOKENS = 5
NUM_CLIENTS = 16
_NUM_DOCUMENTS, _NUM_QUESTIONS = 3, 6
_DOCUMENT_SENTENCES, _QUESTION_SENTENCES = 4, 2
_MIN_MARGIN = 1e-3
"""Between the best logit and the next: less may come out either way."""
_LEFT, _SALTED = 8, 5
"""One request of so many is left after its first token; one of so many belongs to a tenant of its own."""


@dataclass(frozen=True)
class Case:
    """A prompt and its greedy continuation."""

    prompt_ids: list[int]
    token_ids: list[int]


def storm_cases(folder: Path) -> list[Case]:
    """Questions about documents, with what transformers answers in float32; a document is computed once."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cases = []
    for document in range(_NUM_DOCUMENTS):
        head = tokenizer(long_text(_DOCUMENT_SENTENCES, start=1000 * (document + 1)))["input_ids"]
        with torch.inference_mode():
            cache = model(torch.tensor([head]), use_cache=True).past_key_values
            for question in range(_NUM_QUESTIONS):
                text = long_text(_QUESTION_SENTENCES, start=100 * (question + 1) + document)
                tail = tokenizer(text)["input_ids"]
                if (answer := _greedy(model, copy.deepcopy(cache), tail)) is not None:
                    cases.append(Case(head + tail, answer))
    assert len(cases) > _NUM_DOCUMENTS * _NUM_QUESTIONS / 2
    return cases


def _greedy(model: torch.nn.Module, cache: transformers.Cache, tail: Sequence[int]) -> list[int] | None:
    """None if a step is too close to call."""
    tokens: list[int] = []
    step = list(tail)
    for _ in range(MAX_TOKENS):
        logits = model(torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1]
        best = logits.topk(2)
        if float(best.values[0] - best.values[1]) < _MIN_MARGIN:
            return None
        step = [int(best.indices[0])]
        tokens += step
    return tokens


class Storm:
    """Asks for cases in a seeded order, and compares every answer."""

    def __init__(self, server: KelpServer, cases: Sequence[Case], seed: int) -> None:
        self._server = server
        self._cases = cases
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.num_answered = 0
        self.num_cached_tokens = 0

    def run(self, at_most: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Until so many requests have been asked, or it `is_over`."""
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            for client in [pool.submit(self._client, at_most, is_over) for _ in range(NUM_CLIENTS)]:
                client.result()

    def _client(self, at_most: int, is_over: Callable[[], bool]) -> None:
        while not is_over():
            with self._lock:
                number, case = next(self._numbers), self._rng.choice(self._cases)
            if number >= at_most:
                return
            self._ask(number, case)

    def _ask(self, number: int, case: Case) -> None:
        fields: dict[str, object] = {"cache_salt": f"tenant {number}"} if number % _SALTED == 0 else {}
        prompt = np.array(case.prompt_ids, np.int32)
        with self._server.open(input_ids=prompt, max_tokens=MAX_TOKENS, ignore_eos=True, **fields) as call:
            if number % _LEFT == 0:
                assert call.next().token_ids == case.token_ids[:1]
                return
            answer = call.answer()
        assert answer.token_ids == case.token_ids, f"request {number}"
        with self._lock:
            self.num_answered += 1
            self.num_cached_tokens += answer.last.number("cached_tokens")
