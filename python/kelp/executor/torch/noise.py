"""Randomness that depends on nothing but a request's seed, the output index and the token id.

A request that moves to another worker, batch or device must draw the same numbers. A counter-based generator
gives each token id its own number without a stream to replay; integer arithmetic makes it the same on every
machine, which no library generator promises across devices and versions.
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
"""Torch's integers are signed; products and sums wrap as the unsigned ones of the source do."""


def noise_key(seed: int, index: int) -> int:
    """What distinguishes the draw for output token `index` of a request with `seed`, below 2**64: a signed 64-bit."""
    raw = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    digest = hashlib.blake2b(raw, digest_size=8, person=b"kelp-sample").digest()
    return int.from_bytes(digest, "little", signed=True)


def exponential_noise(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Independent Exp(1) numbers, one per key and token id, on the device of both.

    Args:
        keys: `[num_rows, 1] int64`, of `noise_key`.
        token_ids: `[num_candidates] int64`, or `[num_rows, num_candidates]`.

    Returns:
        `[num_rows, num_candidates] float64`, positive and finite.

    Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), keyed by a hash of (seed, index).
    """
    state = keys + (token_ids + 1) * _GOLDEN
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    state ^= _shift_right(state, 31)
    uniform = (_shift_right(state, 11).double() + 0.5) * 2.0**-53
    return uniform.log_().neg_()


def _shift_right(state: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The shift of unsigned integers: zeros come in from the left."""
    return (state >> num_bits).bitwise_and_((1 << (64 - num_bits)) - 1)
