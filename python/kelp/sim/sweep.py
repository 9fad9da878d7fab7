"""Trying a policy's settings: the same number of combinations for everybody, and one rule for which is best.

Runs simulations one at a time; whoever has more cores shares the combinations out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from kelp.core.config import PolicyName
from kelp.sim.contestants import Contestant

Grid = Mapping[str, Sequence[float]]

GRIDS: dict[PolicyName, Grid] = {
    "kelp": {"work_weight": (0.5, 1.0, 2.0), "itl_weight": (0.0, 8.0)},
    "dynamo": {"prefill_load_scale": (1.0, 2.0, 4.0), "active_request_weight": (0.0, 8.0)},
    "sglang": {"cache_threshold": (0.1, 0.3), "balance_abs_threshold": (4.0, 16.0, 64.0)},
}
"""Values to try by policy and field, six combinations each; policies that are not here have nothing to set."""


def combinations(policy: PolicyName) -> list[Contestant]:
    """Every combination of a policy's grid; none for a policy without one."""
    grid = GRIDS.get(policy)
    if grid is None:
        return []
    settings = itertools.product(*grid.values())
    return [Contestant(policy, dict(zip(grid, values, strict=True))) for values in settings]


def score(goodput_rps: float, ttft_p99_s: float) -> float:
    """What tuning maximises: one per cent of goodput is worth as much as one of p99 TTFT."""
    return math.log(max(goodput_rps, 1e-9)) - math.log(max(ttft_p99_s, 1e-9))
