"""Which blocks are about to enter the prefix cache, and who makes them.

A request that needs such a block next waits for it instead of computing it a second time. Only sequences that hold
their blocks make promises here, and those always get on, so no request waits for one that waits itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from kelp.core.types import SequenceHash


class PromisedBlocks:
    """Names of full blocks that running prompts and awaited imports will seal."""

    def __init__(self) -> None:
        self._makers: dict[SequenceHash, object] = {}
        self._promises: dict[object, Many[SequenceHash]] = {}

    def __contains__(self, sequence_hash: SequenceHash) -> bool:
        """Whether somebody makes this block."""
        return sequence_hash in self._makers

    def promise(self, sequence: object, hashes: Many[SequenceHash]) -> None:
        """A sequence got empty blocks for these; of several makers the first counts."""
        self._promises[sequence] = hashes
        for sequence_hash in hashes:
            self._makers.setdefault(sequence_hash, sequence)

    def keep(self, hashes: Many[SequenceHash]) -> None:
        """These blocks are in the cache, whoever made them."""
        for sequence_hash in hashes:
            self._makers.pop(sequence_hash, None)

    def withdraw(self, sequence: object) -> None:
        """A sequence gives its blocks back, or has made them all; idempotent."""
        hashes = self._promises.pop(sequence, ())
        if not self._makers:
            return
        for sequence_hash in hashes:
            if self._makers.get(sequence_hash) is sequence:
                del self._makers[sequence_hash]
