"""Dynamo's block formula (v1.5): blocks to prefill there plus blocks that decode there.

Also what `kelp` falls back to before anything has been measured. Lower tiers count for less than the device tier, as
documented; active prefill includes what is pending, without decay, which is Dynamo's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from kelp.router.decision.costs import Costs
from kelp.router.decision.policies.base import lowest


@dataclass(frozen=True, slots=True)
class DynamoPolicy:
    """Dynamo's documented defaults.

    Attributes:
        overlap_credit: Of blocks on the device.
        host_credit: Of blocks in host memory.
        disk_credit: Of blocks on disk or beyond.
        prefill_load_scale: Weight of a block to prefill against one that decodes.
        active_request_weight: Blocks that an active request counts for.
        temperature: See `lowest`.
    """

    overlap_credit: float = 1.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    prefill_load_scale: float = 1.0
    active_request_weight: float = 0.0
    temperature: float = 0.0

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        return lowest(self.cost(costs), rng, self.temperature)

    def cost(self, costs: Costs) -> npt.NDArray[np.float64]:
        """`[n]`, blocks."""
        prompt_tokens = costs.num_prompt_tokens if costs.computes_prompt else 0
        raw = (costs.pending_tokens + prompt_tokens) / costs.block_size
        prefill = np.maximum(raw - self._credit(costs), 0.0) if costs.computes_prompt else raw
        blocks = self.prefill_load_scale * prefill + costs.kv_tokens / costs.block_size
        if self.active_request_weight:
            blocks = blocks + self.active_request_weight * costs.active
        return blocks * costs.factor

    def _credit(self, costs: Costs) -> npt.NDArray[np.float64]:
        if costs.overlap_tiers is None:
            return self.overlap_credit * costs.overlap
        device, host, *_, last = costs.overlap_tiers.T
        credit: npt.NDArray[np.float64] = (
            self.overlap_credit * device + self.host_credit * (host - device) + self.disk_credit * (last - host)
        )
        return credit
