"""kelp's policy: predicted seconds, this request's and those that it costs everybody else.

The sum of

- its time to first token
- by how much longer prompts wait that are there already (`router.decision.prompt_order`: where a short prompt passes a
  long one, the long one pays)
- the worker's time that its prompt takes: requests still to come wait for it as well. This is what keeps requests
  near their blocks where queues are empty, and long prompts on fast workers
- by how much it makes tokens late: its prompt holds up every answer of its worker, the shorter the more, as a short
  one has few tokens to spread the wait over; and its own tokens come slower where many are generated.

A second counts as a second, whoever waits for it. Nothing is said of caches that are too small: a worker that has lost
a prefix offers less overlap, which costs its seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from kelp.router.decision.costs import Costs
from kelp.router.decision.policies.base import lowest
from kelp.router.decision.policies.dynamo import DynamoPolicy

_UNMEASURED = DynamoPolicy()


@dataclass(frozen=True, slots=True)
class KelpPolicy:
    """Weights of the terms, in seconds of time to first token.

    Attributes:
        hold_up_weight: Of a second that a prompt which is there already waits longer.
        work_weight: Of a second of the worker's time that the prompt takes.
        itl_weight: Of a second that the mean time between a request's tokens grows by.
        temperature: See `lowest`.
    """

    hold_up_weight: float = 1.0
    work_weight: float = 1.0
    itl_weight: float = 8.0
    temperature: float = 0.0

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        cost = self.cost(costs) if costs.is_measured else _UNMEASURED.cost(costs)
        return lowest(cost, rng, self.temperature)

    def cost(self, costs: Costs) -> npt.NDArray[np.float64]:
        """`[n]`, seconds."""
        stall_weight = self.itl_weight / max(costs.usual_output - 1.0, 1.0)
        cost: npt.NDArray[np.float64] = (
            costs.ttft_s
            + self.hold_up_weight * costs.hold_up_s
            + costs.compute_s * (self.work_weight + stall_weight * costs.active)
            + self.itl_weight * costs.itl_s
        )
        return cost * costs.factor
