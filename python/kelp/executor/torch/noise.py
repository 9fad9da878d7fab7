"""Randomness that depends on nothing but a request's seed, the output index and the token id.

A request that moves to another worker, batch or device must draw the same numbers. A counter-based generator
gives each token id its own number without a stream to replay; integer arithmetic makes it the same on every
machine, which no library generator promises across devices and versions.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def exponential_noise(seed: int, index: int, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Independent Exp(1) numbers, one per token id.

    Args:
        seed: The request's, below 2**64.
        index: Which output token is being chosen.
        token_ids: `[num_candidates] int64`.

    Returns:
        `[num_candidates]`, positive and finite.

    Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), keyed by a hash of (seed, index).
    """
    raw = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    key = hashlib.blake2b(raw, digest_size=8, person=b"kelp-sample").digest()
    state = np.uint64(int.from_bytes(key, "little")) + (token_ids.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    state ^= state >> np.uint64(31)
    uniform = ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: npt.NDArray[np.float64] = -np.log(uniform)
    return noise
