"""What the mock says: every token is a pure function of all tokens before it, and of the seed if there is one.

A *state* sums up a sequence up to a position: 64 bits, the wrapping sum of a hash of each token with its position. So
it can be continued from the state before, over many tokens at once, and differs as soon as one token or two places do.
The states are what the mock writes as KV: a token that follows wrong KV is a wrong token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kelp.core.messages import SamplingParams

States = npt.NDArray[np.uint64]
"""`[num_tokens] uint64`, the state after each token."""

EMPTY = 0
"""State before the first token."""
FEW = 16
"""Up to so many tokens are faster one by one than as an array."""

_MASK = (1 << 64) - 1
_TOKEN_FACTOR, _STATE_FACTOR, _SEED_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15
"""Odd constants of SplitMix64 (https://prng.di.unimi.it/splitmix64.c), of which one round mixes enough here."""
_TOKEN_FACTOR_U64, _STATE_FACTOR_U64 = np.uint64(_TOKEN_FACTOR), np.uint64(_STATE_FACTOR)
_POSITION_SHIFT, _TOKEN_SHIFT, _STATE_SHIFT = np.uint64(32), np.uint64(29), np.uint64(31)


def next_state(state: int, token_id: int, position: int) -> int:
    """The state after one more token, which stands at `position`."""
    value = ((((position + 1) << 32) | token_id) * _TOKEN_FACTOR) & _MASK
    return (state + (value ^ (value >> 29))) & _MASK


def next_states(state: int, tokens: npt.NDArray[np.int32], start: int) -> States:
    """The same for many: the state after each of `tokens`, the first of which stands at `start`."""
    values = np.arange(start + 1, start + 1 + len(tokens), dtype=np.uint64)
    values <<= _POSITION_SHIFT
    values |= tokens.astype(np.uint64)
    values *= _TOKEN_FACTOR_U64
    values ^= values >> _TOKEN_SHIFT
    values[:1] += np.uint64(state)
    states: States = values.cumsum(dtype=np.uint64)
    return states


def last_state(state: int, tokens: npt.NDArray[np.int32], start: int) -> int:
    """The last of `next_states`, or `state` itself without tokens."""
    if len(tokens) > FEW:
        return int(next_states(state, tokens, start)[-1])
    for position, token_id in enumerate(tokens.tolist(), start):
        state = next_state(state, token_id, position)
    return state


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which tokens the mock knows.

    Attributes:
        size: Token ids are below this.
        silent_ids: Sorted ids that it never says: those that end a sequence, so that the client decides on its length.
    """

    size: int
    silent_ids: tuple[int, ...] = ()

    def token_after(self, state: int, sampling: SamplingParams) -> int:
        """The token that follows; the seed counts if the temperature is not 0, nothing else of `sampling` does."""
        state ^= _seed_mask(sampling)
        mixed = ((state ^ (state >> 31)) * _STATE_FACTOR) & _MASK
        token_id = (mixed >> 32) % (self.size - len(self.silent_ids))
        for silent_id in self.silent_ids:
            if silent_id <= token_id:
                token_id += 1
        return token_id

    def continuation(self, tokens: Sequence[int], num_tokens: int, sampling: SamplingParams | None = None) -> list[int]:
        """The next `num_tokens` tokens after `tokens`: the reference that every served answer must equal."""
        sampling = sampling or SamplingParams()
        state = last_state(EMPTY, np.asarray(tokens, np.int32), 0)
        return self.continue_from(state, len(tokens), num_tokens, sampling)

    def tokens_after(self, states: States, sampling: SamplingParams) -> list[int]:
        """`token_after` of many states at once."""
        mixed = states ^ np.uint64(_seed_mask(sampling))
        mixed ^= mixed >> _STATE_SHIFT
        mixed *= _STATE_FACTOR_U64
        mixed >>= _POSITION_SHIFT
        mixed %= np.uint64(self.size - len(self.silent_ids))
        for silent_id in self.silent_ids:
            mixed += mixed >= silent_id
        said: list[int] = mixed.tolist()
        return said

    def continue_from(self, state: int, position: int, num_tokens: int, sampling: SamplingParams) -> list[int]:
        """The next tokens after a state; the first of them will stand at `position`."""
        # `token_after` and `next_state` in one: each token needs the one before, so this takes the most of a draft.
        seed_mask = _seed_mask(sampling)
        num_ids, silent_ids = self.size - len(self.silent_ids), self.silent_ids
        said: list[int] = []
        for place in range(position + 1, position + 1 + num_tokens):
            mixed = state ^ seed_mask
            token_id = ((((mixed ^ (mixed >> 31)) * _STATE_FACTOR) & _MASK) >> 32) % num_ids
            for silent_id in silent_ids:
                if silent_id <= token_id:
                    token_id += 1
            said.append(token_id)
            value = (((place << 32) | token_id) * _TOKEN_FACTOR) & _MASK
            state = (state + (value ^ (value >> 29))) & _MASK
        return said


def _seed_mask(sampling: SamplingParams) -> int:
    return ((sampling.seed + 1) * _SEED_FACTOR) & _MASK if sampling.temperature else 0
