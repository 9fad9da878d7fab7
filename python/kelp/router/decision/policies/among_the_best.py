"""Power of two choices among the best: for counts that are known to be out of date."""

from __future__ import annotations

import math
from random import Random

import numpy as np

from kelp.router.decision.costs import Costs
from kelp.router.decision.policies.dynamo import DynamoPolicy

_SHARE = 0.25
_UNMEASURED = DynamoPolicy()


class AmongTheBestPolicy:
    """The less loaded one of two drawn from the best quarter, at least two.

    Several routers that see the same old counts would all choose the same worker; two draws part them, and the ranking
    keeps requests near their blocks.
    """

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        if len(costs) == 1:
            return 0
        cost = costs.ttft_s * costs.factor if costs.is_measured else _UNMEASURED.cost(costs)
        ranked = np.argsort(cost, kind="stable")
        best = ranked[: max(2, math.ceil(_SHARE * len(costs)))].tolist()
        one, other = rng.sample(best, 2)
        return int(one if costs.active[one] <= costs.active[other] else other)
