"""SGLang router's cache-aware policy: longest match while the load is balanced, shortest queue when it is not."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kelp.router.decision.costs import Costs
from kelp.router.decision.policies.base import lowest


@dataclass(frozen=True, slots=True)
class SGLangPolicy:
    """Defaults of sglang-router's command line.

    Attributes:
        cache_threshold: Share of the prompt that must match; below it, the worker with the smallest cache is taken.
        balance_abs_threshold: Imbalanced if the longest queue exceeds the shortest by more than this,
        balance_rel_threshold: and is more than this many times as long.
        temperature: See `lowest`.
    """

    cache_threshold: float = 0.3
    balance_abs_threshold: float = 64.0
    balance_rel_threshold: float = 1.5
    temperature: float = 0.0

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        longest = float(costs.active.max())
        shortest = float(costs.active.min())
        if longest - shortest > self.balance_abs_threshold and longest > shortest * self.balance_rel_threshold:
            return lowest(costs.active, rng, self.temperature)
        matched = costs.overlap * costs.block_size
        if float(matched.max()) > self.cache_threshold * costs.num_prompt_tokens:
            return lowest(-matched, rng, self.temperature)
        return lowest(costs.placed_tokens, rng, self.temperature)
