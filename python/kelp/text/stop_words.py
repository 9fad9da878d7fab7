"""Finds stop words in a stream of text, wherever they are split between deltas.

An Aho-Corasick automaton: one step per character, however many words there are. The text that is held back at any
moment is exactly the longest end that could still become a stop word. Knows nothing of tokens.

Source: Aho and Corasick, "Efficient string matching: an aid to bibliographic search", CACM 18(6), 1975.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """What one delta leads to.

    Attributes:
        text: May be shown now; ends before the stop word.
        is_hit: Whether a stop word was found; the sequence is over then.
    """

    text: str
    is_hit: bool


class StopWords:
    """The state of one sequence.

    The word that is complete first wins; of several complete at the same character, the longest. So the outcome
    does not depend on how the text is cut into deltas.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._matched_length = [0]
        self._fallback = [0]
        for word in words:
            self._insert(word)
        self._link()
        self._node = 0
        self._held = ""
        self._is_hit = False

    def push(self, delta: str) -> StopResult:
        """Take the next text; after a hit, all further text is swallowed."""
        if self._is_hit:
            return StopResult("", True)
        if len(self._next) == 1:
            return StopResult(delta, False)
        text = self._held + delta
        for end, character in enumerate(delta, start=len(self._held) + 1):
            self._node = self._step(self._node, character)
            length = self._matched_length[self._node]
            if length:
                self._is_hit, self._held = True, ""
                return StopResult(text[: end - length], True)
        boundary = len(text) - self._depth[self._node]
        self._held = text[boundary:]
        return StopResult(text[:boundary], False)

    def flush(self) -> str:
        """At the end of the sequence: the text held back."""
        held, self._held, self._node = self._held, "", 0
        return held

    def _insert(self, word: str) -> None:
        node = 0
        for character in word:
            child = self._next[node].get(character)
            if child is None:
                child = len(self._next)
                self._next[node][character] = child
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._matched_length.append(0)
                self._fallback.append(0)
            node = child
        self._matched_length[node] = len(word)

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            fallback = self._fallback[node]
            if not self._matched_length[node]:
                self._matched_length[node] = self._matched_length[fallback]
            for character, child in self._next[node].items():
                self._fallback[child] = self._step(fallback, character)
                queue.append(child)

    def _step(self, node: int, character: str) -> int:
        while True:
            child = self._next[node].get(character)
            if child is not None:
                return child
            if node == 0:
                return 0
            node = self._fallback[node]
