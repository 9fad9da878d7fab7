"""Turns what workers tell into observations of their rates.

A prompt's own time cannot be read off its request: it shares steps with prompts before and after it, and with
sequences that decode. What can be read off is what the worker did between two first tokens while it had prompts to
compute; first tokens that come together are one observation.
"""

from __future__ import annotations

from dataclasses import dataclass

from kelp.router.load import Load
from kelp.router.outcome import Ended, FirstToken
from kelp.timing.rates import Rates, Work

_TOGETHER_S = 1e-3
_MIN_DECODE_TOKENS = 8
_LEAST_DECODE_SHARE = 0.2


@dataclass(slots=True)
class _Stretch:
    """Prompts that were computed between `since_s` and `until_s`, and what of it has not been learned from."""

    since_s: float
    until_s: float
    longest_s: float
    work: Work


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
        sequences = work.steps * float(load.num_decoding[slot])
        context = work.steps * float(load.context_tokens[slot])
        work = Work(work.steps, work.tokens, work.pairs, sequences, context)
        last = self._stretches.get(slot)
        if last is not None and now_s - last.until_s <= _TOGETHER_S:
            last.work = Work(*(mine + other for mine, other in zip(last.work, work, strict=True)))
            last.longest_s = max(last.longest_s, told.prefill_s)
            return
        if last is not None:
            self._learn(slot, last)
        since_s = begun_s if last is None else max(last.until_s, begun_s)
        self._stretches[slot] = _Stretch(since_s, now_s, told.prefill_s, work)

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
        if stretch.longest_s > 0.0:
            seconds = min(seconds, stretch.longest_s)
        self._rates.observe(slot, stretch.work, seconds)
