"""Tier G3: blocks in preallocated files, kept over restarts and crashes (see `tiers.base.DiskTier`)."""

from kelp.kv.tiers.disk.opening import open_disk_tier
from kelp.kv.tiers.disk.tier import DiskCounts, FileDiskTier

__all__ = ["DiskCounts", "FileDiskTier", "open_disk_tier"]
