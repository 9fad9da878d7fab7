"""kelp's policy: predicted seconds, this request's and those that it costs everybody else.

its time to first token
+ the worker's time that its prompt takes: requests still to come wait for it as well
+ by how much it makes tokens late: a prompt holds up all sequences of its worker. A short answer suffers most, as
  its mean time between tokens has few tokens to spread the wait over; so its worker is spared, and it keeps away
  from workers with much to compute itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from kelp.router.costs import Costs
from kelp.router.policies.base import lowest
from kelp.router.policies.dynamo import DynamoPolicy

_UNMEASURED = DynamoPolicy()


@dataclass(frozen=True, slots=True)
class KelpPolicy:
    """Weights of the terms, in seconds of time to first token.

    Attributes:
        work_weight: Of a second of the worker's time that the prompt takes.
        itl_weight: Of a second that the mean time between a request's tokens grows by.
        own_share: Of what waits before the prompt, this much is left to hold up the request's own tokens.
        temperature: See `lowest`.
    """

    work_weight: float = 1.5
    itl_weight: float = 8.0
    own_share: float = 0.15
    fifo: float = 1.0
    pending_weight: float = 0.0
    temperature: float = 0.0

    def choose(self, costs: Costs, rng: Random) -> int:
        """See `CostPolicy`."""
        cost = self.cost(costs) if costs.is_measured else _UNMEASURED.cost(costs)
        return lowest(cost, rng, self.temperature)

    def cost(self, costs: Costs) -> npt.NDArray[np.float64]:
        """`[n]`, seconds."""
        itl_of_others_s = costs.compute_s * costs.active / max(costs.usual_output - 1.0, 1.0)
        own_itl_s = costs.itl_s + costs.queue_s * (self.own_share / max(costs.num_output - 1.0, 1.0))
        cost: npt.NDArray[np.float64] = (
            costs.ttft_s - (1.0 - self.fifo) * (costs.queue_s - costs.shared_s) + self.pending_weight * costs.shared_s + self.work_weight * costs.compute_s + self.itl_weight * (itl_of_others_s + own_itl_s)
        )
        return cost * costs.factor
