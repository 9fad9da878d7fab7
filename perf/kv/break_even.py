"""From which length on bringing a prefix pays."""

from __future__ import annotations

import math
from collections.abc import Mapping

MAX_TOKENS = 1_048_576
"""Longer break-even lengths are reported as this one, and mean: never."""


def fit_line(points: Mapping[int, float]) -> tuple[float, float]:
    """Intercept and slope of the line through points, by least squares of relative errors.

    Args:
        points: Seconds by number of tokens; at least two.
    """
    weights = {tokens: 1 / seconds**2 for tokens, seconds in points.items()}
    total = math.fsum(weights.values())
    mean_x = math.fsum(weight * tokens for tokens, weight in weights.items()) / total
    mean_y = math.fsum(weights[tokens] * seconds for tokens, seconds in points.items()) / total
    spread = math.fsum(weight * (tokens - mean_x) ** 2 for tokens, weight in weights.items())
    slope = (
        math.fsum(weights[tokens] * (tokens - mean_x) * (seconds - mean_y) for tokens, seconds in points.items())
        / spread
    )
    return mean_y - slope * mean_x, slope


def break_even_tokens(bring: Mapping[int, float], compute: Mapping[int, float], block_size: int) -> float:
    """Where the lines through what bringing and computing take cross.

    Args:
        bring: Seconds by number of tokens.
        compute: The same for computing them.
        block_size: Tokens of a block.

    Returns:
        One block at least, `MAX_TOKENS` at most.
    """
    bring_s, bring_token_s = fit_line(bring)
    compute_s, compute_token_s = fit_line(compute)
    if bring_s <= compute_s and bring_token_s <= compute_token_s:
        return float(block_size)
    if bring_token_s >= compute_token_s:
        # Dearer per token: it pays nowhere, or only below the crossing, which no prompt is long enough to need.
        return float(MAX_TOKENS)
    return float(min(MAX_TOKENS, max(block_size, (bring_s - compute_s) / (compute_token_s - bring_token_s))))
