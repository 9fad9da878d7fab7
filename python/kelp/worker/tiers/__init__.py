"""A worker's side of the KV block manager: what goes down, what comes back, and life without it."""

from kelp.worker.tiers.service import TierParts, WorkerTiers

__all__ = ["TierParts", "WorkerTiers"]
