"""Eviction policies by the name that configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from kelp.core.config_kv import EvictionName
from kelp.kv.eviction.base import EvictionPolicy
from kelp.kv.eviction.cost import CostPolicy
from kelp.kv.eviction.lfu import LfuPolicy
from kelp.kv.eviction.lru import LruPolicy
from kelp.kv.eviction.s3_fifo import S3FifoPolicy

_MAKERS: dict[EvictionName, Callable[[int], EvictionPolicy]] = {
    "cost": CostPolicy,
    "lru": lambda _: LruPolicy(),
    "lfu": lambda _: LfuPolicy(),
    "s3-fifo": S3FifoPolicy,
}

POLICY_NAMES: tuple[EvictionName, ...] = tuple(_MAKERS)
"""The default first."""


def make_policy(name: EvictionName, num_slots: int) -> EvictionPolicy:
    """A policy for a tier of `num_slots` (at least 1) blocks."""
    return _MAKERS[name](num_slots)
