"""The most that routing could reach: prefix hits of one cache that holds what all workers' caches hold together.

Same policy as `kv.pool`: least recently used, and of what a request used, the tail goes first. Requests take no time
here and output is not kept, so no fleet of that total size does much better.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from kelp.core.types import SequenceHash
from kelp.sim.requests import Workload

Hits = npt.NDArray[np.int64]


def pooled_hits(workload: Workload, num_blocks: int | None) -> Hits:
    """Prompt tokens of each request that a pooled cache has, `[num_requests] int64`.

    Args:
        workload: In order of arrival.
        num_blocks: Capacity of all workers together; None for a cache that never forgets.
    """
    cache: OrderedDict[SequenceHash, None] = OrderedDict()
    found = np.zeros(len(workload.requests), np.int64)
    for index, request in enumerate(workload.requests):
        hashes = request.block_hashes
        num_hits = 0
        for block_hash in hashes:
            if block_hash not in cache:
                break
            num_hits += 1
        found[index] = num_hits * workload.block_size
        for block_hash in reversed(hashes):
            cache[block_hash] = None
            cache.move_to_end(block_hash)
        while num_blocks is not None and len(cache) > num_blocks:
            cache.popitem(last=False)
    return found


def prompt_tokens(workload: Workload) -> Hits:
    """ISL of each request, `[num_requests] int64`."""
    return np.fromiter((request.num_prompt_tokens for request in workload.requests), np.int64, len(workload.requests))


def hit_share(hits: Hits, tokens: Hits) -> float:
    """Share of prompt tokens that were not computed; 0 for an empty workload."""
    total = int(tokens.sum())
    return float(hits.sum()) / total if total else 0.0
