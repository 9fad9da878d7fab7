"""Identity of KV blocks (design: "Block identity").

A full block of `block_size` tokens is named by a 128-bit digest chained over everything before it, so equal
names mean equal prefixes. The seed carries model, LoRA and cache salt: another tenant's salt can never
produce the same name. blake2b is collision-resistant, in the standard library, and hashes a 16-token block
in about a microsecond.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kelp.core.types import SequenceHash

_DIGEST_BYTES = 16
HASH_VERSION = 1
"""Changes whenever equal tokens would get another name; part of the seed."""


def seed_hash(model_id: str, lora_id: str = "", cache_salt: str = "") -> SequenceHash:
    """Parent of the first block of a sequence.

    Fields are length-prefixed, so that no two combinations share one encoding. Empty equals absent.

    Args:
        model_id: `core.model_identity.model_identity`.
        lora_id: `core.model_identity.lora_id`: not the name alone, because KV outlives what a name stood for.
        cache_salt: The tenant's.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"kelp-kv-seed")
    digest.update(HASH_VERSION.to_bytes(4, "little"))
    for field in (model_id, lora_id, cache_salt):
        raw = field.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return SequenceHash(digest.digest())


def child_hash(parent: SequenceHash, tokens: npt.NDArray[np.int32] | Sequence[int]) -> SequenceHash:
    """Name of the full block `tokens` (int32) that follows `parent`."""
    raw = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
    return SequenceHash(hashlib.blake2b(parent + raw, digest_size=_DIGEST_BYTES, person=b"kelp-kv-block").digest())


def sequence_hashes(
    tokens: npt.NDArray[np.int32] | Sequence[int], block_size: int, seed: SequenceHash
) -> list[SequenceHash]:
    """Names of all full blocks of `tokens` `[num_tokens]` in order; a partial tail has none."""
    array = np.asarray(tokens, dtype="<i4")
    hashes: list[SequenceHash] = []
    parent = seed
    for start in range(0, len(array) - block_size + 1, block_size):
        parent = child_hash(parent, array[start : start + block_size])
        hashes.append(parent)
    return hashes
