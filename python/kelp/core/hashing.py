"""Identity of KV blocks (design: "Block identity").

A full block of `block_size` tokens is named by a 128-bit digest chained over everything before it, so equal
names mean equal prefixes. The seed carries model, LoRA and cache salt: another tenant's salt can never
produce the same name. Blocks with media carry digests of the media's content. blake2b is collision-resistant, in the
standard library, and hashes a 16-token block in about a microsecond.

Dynamo's names are here for routers and tools that speak to its parts; nothing of ours is found by them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from kelp.core.types import SequenceHash

_DIGEST_BYTES = 16
_TOKEN_BYTES = 4
_DYNAMO_SEED = 1337
_MAX_SEEDS = 1024
HASH_VERSION = 1
"""Changes whenever equal tokens would get another name; part of the seed."""
_new_block = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"kelp-kv-block").copy
"""A copy takes half the time of reading the parameters again."""


def seed_hash(model_id: str, lora_id: str = "", cache_salt: str = "") -> SequenceHash:
    """Parent of the first block of a sequence.

    Fields are length-prefixed, so that no two combinations share one encoding. Empty equals absent.

    Args:
        model_id: `core.model_identity.model_identity`.
        lora_id: `core.model_identity.lora_id`: not the name alone, because KV outlives what a name stood for.
        cache_salt: The tenant's.
    """
    # A salt is a secret, and is not kept.
    return _seed_hash(model_id, lora_id, cache_salt) if cache_salt else _seed_without_salt(model_id, lora_id)


@lru_cache(_MAX_SEEDS)
def _seed_without_salt(model_id: str, lora_id: str) -> SequenceHash:
    return _seed_hash(model_id, lora_id, "")


def _seed_hash(model_id: str, lora_id: str, cache_salt: str) -> SequenceHash:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"kelp-kv-seed")
    digest.update(HASH_VERSION.to_bytes(4, "little"))
    for field in (model_id, lora_id, cache_salt):
        raw = field.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return SequenceHash(digest.digest())


def tenant_digest(cache_salt: str) -> bytes:
    """Who a block belongs to, for quotas and removal: 16 bytes that do not tell the salt. Without a salt: everybody's.

    Not an identity of content: that is the salt's part in `seed_hash`.
    """
    return hashlib.blake2b(cache_salt.encode(), digest_size=_DIGEST_BYTES, person=b"kelp-kv-tenant").digest()


class MediaSpan(NamedTuple):
    """Positions of a prompt that stand for an image, a clip or a sound.

    Attributes:
        start: First position.
        num_tokens: Positions, at least one.
        content_digest: Digest of the content itself. Never of its URL: what a URL shows may change.
    """

    start: int
    num_tokens: int
    content_digest: bytes


def child_hash(parent: SequenceHash, tokens: npt.NDArray[np.int32] | Sequence[int], extra: bytes = b"") -> SequenceHash:
    """Name of the full block `tokens` (int32) that follows `parent`; `extra` is what the tokens do not tell."""
    return _child_hash(parent, np.ascontiguousarray(tokens, dtype="<i4").tobytes(), extra)


def _child_hash(parent: SequenceHash, raw: bytes, extra: bytes) -> SequenceHash:
    if not extra:
        block = _new_block()
        block.update(parent + raw)
        return SequenceHash(block.digest())
    digest = hashlib.blake2b(parent, digest_size=_DIGEST_BYTES, person=b"kelp-kv-extra")
    digest.update(len(extra).to_bytes(8, "little"))
    digest.update(extra)
    digest.update(raw)
    return SequenceHash(digest.digest())


def sequence_hashes(
    tokens: npt.NDArray[np.int32] | Sequence[int],
    block_size: int,
    seed: SequenceHash,
    media: Sequence[MediaSpan] = (),
) -> list[SequenceHash]:
    """Names of all full blocks of `tokens` `[num_tokens]` in order; a partial tail has none."""
    raw = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
    size = block_size * _TOKEN_BYTES
    blocks = [raw[start : start + size] for start in range(0, len(raw) - size + 1, size)]
    if not media:
        return _plain_hashes(blocks, seed)
    hashes: list[SequenceHash] = []
    parent = seed
    for index, block in enumerate(blocks):
        parent = _child_hash(parent, block, media_extra(media, index * block_size, block_size))
        hashes.append(parent)
    return hashes


def _plain_hashes(blocks: Sequence[bytes], seed: SequenceHash) -> list[SequenceHash]:
    """`_child_hash` of one after the other, without its calls: a prompt has hundreds, and waits for them twice."""
    hashes: list[SequenceHash] = []
    parent: Any = seed
    for block in blocks:
        digest = _new_block()
        digest.update(parent + block)
        parent = digest.digest()
        hashes.append(parent)
    return hashes


def media_extra(media: Sequence[MediaSpan], start: int, num_tokens: int) -> bytes:
    """What the tokens of the block at `start` do not tell: which media, and which part of each; empty without any."""
    parts = []
    for span in sorted(media):
        if span.start < start + num_tokens and start < span.start + span.num_tokens:
            parts.append((span.start - start).to_bytes(8, "little", signed=True))
            parts.append(span.num_tokens.to_bytes(8, "little"))
            parts.append(len(span.content_digest).to_bytes(8, "little"))
            parts.append(span.content_digest)
    return b"".join(parts)


def dynamo_local_hashes(
    tokens: npt.NDArray[np.int32] | Sequence[int],
    block_size: int,
    lora_name: str = "",
    cache_salt: str = "",
    media: Sequence[Sequence[int]] = (),
) -> list[int]:
    """Names that Dynamo gives to full blocks by their tokens alone: 64 bits, to look its workers up, never to serve KV.

    Args:
        tokens: `[num_tokens]`, taken as uint32.
        block_size: Tokens per block.
        lora_name: Empty for none.
        cache_salt: Dynamo's cache namespace; empty for none.
        media: By block, 64-bit content hashes of its media in any order; blocks beyond its end have none.

    Source: `compute_block_hash_for_seq` of ai-dynamo-runtime 1.6.1, which the test vectors come from.
    """
    seed = _DYNAMO_SEED
    if lora_name:
        seed += xxhash.xxh3_64_intdigest(lora_name.encode(), 0)
    if cache_salt:
        seed += xxhash.xxh3_64_intdigest(cache_salt.encode(), 1)
    seed %= 1 << 64
    raw = np.asarray(tokens, dtype="<i8").astype("<u4").tobytes()
    size = block_size * 4
    return [
        xxhash.xxh3_64_intdigest(raw[index * size : (index + 1) * size] + _media_bytes(media, index), seed)
        for index in range(len(raw) // size)
    ]


def _media_bytes(media: Sequence[Sequence[int]], index: int) -> bytes:
    hashes = media[index] if index < len(media) else ()
    return b"".join(value.to_bytes(8, "little") for value in sorted(hashes))


def dynamo_sequence_hashes(local_hashes: Sequence[int]) -> list[int]:
    """Dynamo's names of blocks with everything before them: the first is its local hash.

    Source: `compute_seq_hash_for_block` in Dynamo's lib/kv-router; its Python wheel does not export it.
    """
    hashes: list[int] = []
    for local_hash in local_hashes:
        if hashes:
            pair = hashes[-1].to_bytes(8, "little") + local_hash.to_bytes(8, "little")
            hashes.append(xxhash.xxh3_64_intdigest(pair, _DYNAMO_SEED))
        else:
            hashes.append(local_hash)
    return hashes
