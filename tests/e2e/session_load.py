"""A seeded workload: conversations that share documents, by clients who wait for an answer before they ask on."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mock_fleet_rig import Reference, generate, worker_of

from support.serving import KelpServer

NUM_TURNS = 4
MAX_TOKENS = 40
BLOCK_SIZE = 16
_NUM_DOCUMENTS = 16
_DOCUMENT_SENTENCES = 24
_WORDS = (
    "harbour",
    "keeper",
    "barrel",
    "salt",
    "lantern",
    "tide",
    "captain",
    "ledger",
    "rope",
    "signal",
    "gull",
    "cook",
)


@dataclass(frozen=True)
class Turn:
    """One request that was answered.

    Attributes:
        before: The turn before it in its session.
    """

    request_id: str
    prompt: str
    answer: dict[str, Any]
    before: Turn | None

    @property
    def worker(self) -> str:
        return worker_of(self.answer)


class SessionLoad:
    """Asks, remembers the answers, and checks what was said; clients are threads."""

    def __init__(self, server: KelpServer, reference: Reference, seed: int) -> None:
        self.turns: list[Turn] = []
        self._server = server
        self._reference = reference
        self._rng = random.Random(seed)
        self._documents = [self._sentences(_DOCUMENT_SENTENCES) for _ in range(_NUM_DOCUMENTS)]
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def run(self, num_clients: int, at_most: int = 10**6, is_over: Callable[[], bool] = lambda: False) -> list[Turn]:
        """Clients begin so many sessions at most, none when `is_over`, and end those that they began."""
        num_before = len(self.turns)
        left = iter(range(at_most))
        with ThreadPoolExecutor(num_clients) as pool:
            for client in [pool.submit(self._client, left, is_over) for _ in range(num_clients)]:
                client.result()
        return self.turns[num_before:]

    def _client(self, left: Iterator[int], is_over: Callable[[], bool]) -> None:
        while not is_over():
            with self._lock:
                if next(left, None) is None:
                    return
                number, prompts = next(self._numbers), list(itertools.accumulate(self._session()))
            self._hold(number, prompts)

    def _hold(self, number: int, prompts: list[str]) -> None:
        before: Turn | None = None
        for index, prompt in enumerate(prompts):
            name = f"session-{number}-{index}"
            answer = generate(self._server, id=name, text_input=prompt, max_tokens=MAX_TOKENS)
            assert answer["output_ids"] == self._reference.answer(prompt, MAX_TOKENS), name
            before = Turn(name, prompt, answer, before)
            self.turns.append(before)

    def _session(self) -> Iterator[str]:
        yield self._rng.choice(self._documents)
        for _ in range(NUM_TURNS - 1):
            yield self._sentences(2)

    def _sentences(self, count: int) -> str:
        return "".join(" ".join(self._rng.choices(_WORDS, k=9)).capitalize() + ". " for _ in range(count))
