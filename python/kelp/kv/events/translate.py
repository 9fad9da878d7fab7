"""Gives another engine's blocks the names that we give to equal prompts.

vLLM and SGLang name blocks by hashes of their own, which mean nothing outside; but the events tell the tokens, so each
block is hashed our way, chained on the translated parent. A block that the event does not describe in full (unknown
parent, image or embedding content, unknown adapter) gets no name and is left out, and so is all that follows it: the
router then expects less of the worker than it has, never more. One object per worker incarnation; bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from kelp.core.hashing import child_hash
from kelp.core.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KVEvent
from kelp.core.types import SequenceHash, Tier
from kelp.kv.events.codec import BlockRemoved, BlockStored, ForeignEvent, OpaqueHash, text_of, tier_of

SeedOf = Callable[[str, str], SequenceHash | None]
"""Seed of an adapter's name and a cache salt; None for an unknown adapter."""

_WHOLE_PREFIX_KINDS = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})
"""vLLM's kinds of cache groups whose blocks stand for everything before them; a window's do not."""


@dataclass(slots=True)
class _Name:
    sequence_hash: SequenceHash
    parent: SequenceHash | None
    tiers: int = 0


class ForeignNames:
    """One worker's opaque hashes and what they stand for.

    Args:
        block_size: Tokens per block, as registered; events of another size are left out.
        seed_of: Where a sequence's chain begins.
        max_names: Hashes remembered; blocks beyond it are left out.

    Attributes:
        num_dropped: Blocks left out since the start, by reason.
    """

    def __init__(self, block_size: int, seed_of: SeedOf, max_names: int = 1 << 20) -> None:
        self.num_dropped: Counter[str] = Counter()
        self._block_size = block_size
        self._seed_of = seed_of
        self._max_names = max_names
        self._names: dict[OpaqueHash, _Name] = {}
        self._idle: dict[OpaqueHash, None] = {}
        self._group: int | None = None

    def clear(self) -> None:
        """Forget all hashes: the worker lost its cache, or we lost its events."""
        self._names.clear()
        self._idle.clear()

    def translate(self, events: Iterable[ForeignEvent]) -> list[KVEvent]:
        """The same events in our names, as far as they have some."""
        translated: list[KVEvent] = []
        for event in events:
            if isinstance(event, BlockStored):
                translated += self._stored(event)
            elif isinstance(event, BlockRemoved):
                translated += self._removed(event)
            else:
                self.clear()
                translated.append(BlocksCleared())
        return translated

    def _stored(self, event: BlockStored) -> list[KVEvent]:
        tier = tier_of(event.medium)
        if tier is None:
            return self._drop("medium", len(event.block_hashes))
        if not self._is_our_group(event):
            return self._drop("group", len(event.block_hashes))
        if not event.token_ids:
            return self._reported_again(event.block_hashes, tier)
        if event.block_size != self._block_size:
            return self._drop("block_size", len(event.block_hashes))
        if len(event.token_ids) != len(event.block_hashes) * self._block_size:
            return self._drop("tokens", len(event.block_hashes))
        num_plain = _num_plain_blocks(event)
        self._drop("content", len(event.block_hashes) - num_plain)
        return self._named(event, num_plain, tier)

    def _named(self, event: BlockStored, num_blocks: int, tier: Tier) -> list[KVEvent]:
        """Name the first blocks of the event."""
        first_parent = None
        if event.parent_block_hash is None:
            before = self._seed_of(event.lora_name or "", _cache_salt(event))
            if before is None:
                return self._drop("adapter", num_blocks)
        else:
            known = self._names.get(event.parent_block_hash)
            if known is None:
                return self._drop("parent", num_blocks)
            before = first_parent = known.sequence_hash
        tokens = np.asarray(event.token_ids, dtype=np.int32).reshape(-1, self._block_size)
        hashes: list[SequenceHash] = []
        parent = first_parent
        for opaque, block in zip(event.block_hashes[:num_blocks], tokens, strict=False):
            before = child_hash(before, block)
            if not self._remember(opaque, before, parent, tier):
                self._drop("memory", num_blocks - len(hashes))
                break
            hashes.append(before)
            parent = before
        return [BlocksStored(tuple(hashes), first_parent, tier)] if hashes else []

    def _reported_again(self, block_hashes: Sequence[OpaqueHash], tier: Tier) -> list[KVEvent]:
        """Blocks told by their hashes alone: known ones that were copied to another tier."""
        events: list[KVEvent] = []
        for opaque in block_hashes:
            name = self._names.get(opaque)
            if name is None:
                self._drop("unknown", 1)
                continue
            self._remember(opaque, name.sequence_hash, name.parent, tier)
            events.append(BlocksStored((name.sequence_hash,), name.parent, tier))
        return events

    def _removed(self, event: BlockRemoved) -> list[KVEvent]:
        tier = tier_of(event.medium)
        if tier is None or event.group_idx not in (None, self._group):
            return []
        hashes: list[SequenceHash] = []
        for opaque in event.block_hashes:
            name = self._names.get(opaque)
            if name is None or not name.tiers & 1 << tier:
                continue
            name.tiers ^= 1 << tier
            if not name.tiers:
                self._idle[opaque] = None
            hashes.append(name.sequence_hash)
        return [BlocksRemoved(tuple(hashes), tier)] if hashes else []

    def _is_our_group(self, event: BlockStored) -> bool:
        """Hybrid models report one block per cache group; the first one that keeps whole prefixes counts."""
        if event.group_idx is None:
            return True
        if self._group is None and event.kv_cache_spec_kind in _WHOLE_PREFIX_KINDS:
            self._group = event.group_idx
        return event.group_idx == self._group

    def _remember(
        self, opaque: OpaqueHash, sequence_hash: SequenceHash, parent: SequenceHash | None, tier: Tier
    ) -> bool:
        name = self._names.get(opaque)
        if name is None:
            if len(self._names) >= self._max_names and not self._forget_one():
                return False
            name = self._names[opaque] = _Name(sequence_hash, parent)
        elif not name.tiers:
            name.sequence_hash, name.parent = sequence_hash, parent
        self._idle.pop(opaque, None)
        name.tiers |= 1 << tier
        return True

    def _forget_one(self) -> bool:
        """Names of blocks that are nowhere now are kept as long as there is room: a child may still come."""
        if not self._idle:
            return False
        opaque = next(iter(self._idle))
        del self._idle[opaque], self._names[opaque]
        return True

    def _drop(self, reason: str, num_blocks: int) -> list[KVEvent]:
        if num_blocks:
            self.num_dropped[reason] += num_blocks
        return []


def _num_plain_blocks(event: BlockStored) -> int:
    """Leading blocks that are told by tokens, adapter and salt alone."""
    if event.lora_id is not None and event.lora_name is None:
        return 0
    for index, keys in enumerate(event.extra_keys or ()):
        if keys and not _are_plain(keys, event, index):
            return min(index, len(event.block_hashes))
    return len(event.block_hashes)


def _are_plain(keys: Sequence[msgspec.Raw], event: BlockStored, index: int) -> bool:
    """As vLLM lists them: the adapter's name, images, and on the first block of a sequence the salt."""
    texts = [text_of(key) for key in keys]
    if event.lora_name is not None and texts[0] == event.lora_name:
        texts = texts[1:]
    is_first = index == 0 and event.parent_block_hash is None
    return not texts or (is_first and len(texts) == 1 and texts[0] is not None)


def _cache_salt(event: BlockStored) -> str:
    if event.cache_salt is not None:
        return event.cache_salt
    keys = event.extra_keys[0] if event.extra_keys else None
    texts = [text_of(key) or "" for key in keys or ()]
    if event.lora_name is not None and texts and texts[0] == event.lora_name:
        texts = texts[1:]
    return texts[0] if texts else ""
