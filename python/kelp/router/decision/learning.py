"""Turns what workers tell into observations of their rates.

A prompt's own time cannot be read off its request: it shares steps with prompts before and after it, and with
sequences that decode; nor off the first token before it, since part of it may have been computed by then. What can be
read off is what the worker did from having its first prompt to having none left: that is one observation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kelp.router.decision.load import Load
from kelp.router.decision.outcome import Ended, FirstToken
from kelp.timing.rates import Rates, Work

_TOGETHER_S = 1e-3
_MAX_PROMPTS = 64
"""Of one observation: a worker that never runs dry is learned from as well, if less exactly."""

_MIN_DECODE_TOKENS = 8
_LEAST_DECODE_SHARE = 0.2


@dataclass(slots=True)
class _Stretch:
    """What a worker has computed since `since_s`, when it had no prompt.

    Attributes:
        since_s: When it got its first one.
        until_s: Latest first token.
        num_prompts: How many it has computed,
        num_ends: and in how many steps they ended, at least.
        full_steps: Steps that prompts longer than one filled.
        tokens: See `Work`, as `pairs`.
        num_decoding: Sequences that decoded when a prompt ended, summed over the prompts.
        context_tokens: And their KV.
        computing_s: Time that each prompt was being computed for, summed up; these times overlap.
    """

    since_s: float
    until_s: float = -math.inf
    num_prompts: int = 0
    num_ends: int = 0
    full_steps: float = 0.0
    tokens: float = 0.0
    pairs: float = 0.0
    num_decoding: float = 0.0
    context_tokens: float = 0.0
    computing_s: float = 0.0

    @property
    def work(self) -> Work:
        """All of it. Short prompts are computed in the steps of long ones, whatever is left of those."""
        steps = max(self.full_steps, float(self.num_ends))
        share = steps / self.num_prompts
        return Work(steps, self.tokens, self.pairs, share * self.num_decoding, share * self.context_tokens)


@dataclass(slots=True)
class Generating:
    """A sequence from its first token on, as `Learning.ended` needs it."""

    slot: int
    interference_s: float
    num_decoding: float
    context_tokens: float


class Learning:
    """Observes each slot's busy stretches; belongs to one event loop."""

    def __init__(self, rates: Rates, load: Load) -> None:
        self._rates = rates
        self._load = load
        self._stretches: dict[int, _Stretch] = {}
        self._prompt_s: list[float] = []

    def begin(self, slot: int) -> None:
        """A worker that nothing is known of has this slot now."""
        self._rates.begin(slot)
        self._stretches.pop(slot, None)
        self._prompt_s.extend([0.0] * (slot + 1 - len(self._prompt_s)))
        self._prompt_s[slot] = 0.0

    def prefilled(self, slot: int, work: Work, told: FirstToken, begun_s: float, now_s: float) -> None:
        """A prompt that was reserved at `begun_s` has been computed.

        Args:
            slot: Where.
            work: Its own computation, decoding sequences not counted.
            told: What the worker says of it.
            begun_s: When it was sent there.
            now_s: Now.
        """
        rates, load = self._rates, self._load
        self._prompt_s[slot] += rates.seconds(slot, Work(0.0, work.tokens, work.pairs))
        stretch = self._stretches.get(slot)
        if stretch is None:
            stretch = self._stretches[slot] = _Stretch(begun_s)
        if now_s - stretch.until_s > _TOGETHER_S:
            stretch.num_ends += 1
        stretch.until_s = now_s
        stretch.num_prompts += 1
        stretch.full_steps += work.steps if work.steps > 1.0 else 0.0
        stretch.tokens += work.tokens
        stretch.pairs += work.pairs
        stretch.num_decoding += float(load.num_decoding[slot])
        stretch.context_tokens += float(load.context_tokens[slot])
        stretch.computing_s += told.prefill_s
        is_last = load.num_pending[slot] <= 1.0
        if is_last or stretch.num_prompts >= _MAX_PROMPTS:
            self._learn(slot, stretch)
            del self._stretches[slot]
            if not is_last:
                self._stretches[slot] = _Stretch(now_s)

    def generating(self, slot: int) -> Generating:
        """A sequence begins to generate there."""
        load = self._load
        return Generating(slot, self._prompt_s[slot], float(load.num_decoding[slot]), float(load.context_tokens[slot]))

    def ended(self, generating: Generating, ended: Ended) -> None:
        """It has generated all its tokens; its worker still counts it."""
        num_steps = ended.num_output_tokens - 1
        if num_steps < _MIN_DECODE_TOKENS or ended.decode_s <= 0.0:
            return
        load, slot = self._load, generating.slot
        prompts_s = self._prompt_s[slot] - generating.interference_s
        decode_s = max(ended.decode_s - prompts_s, _LEAST_DECODE_SHARE * ended.decode_s)
        sequences = 0.5 * (generating.num_decoding + float(load.num_decoding[slot]))
        context = 0.5 * (generating.context_tokens + float(load.context_tokens[slot]))
        work = Work(num_steps, 0.0, 0.0, num_steps * sequences, num_steps * context)
        self._rates.observe(slot, work, decode_s)

    def _learn(self, slot: int, stretch: _Stretch) -> None:
        seconds = stretch.until_s - stretch.since_s
        if stretch.computing_s > 0.0:
            seconds = min(seconds, stretch.computing_s)
        self._rates.observe(slot, stretch.work, seconds)
