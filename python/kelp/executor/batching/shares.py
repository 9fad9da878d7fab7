"""How prompts that are being computed share a step's tokens.

Half of the budget goes to the prompts with least left to compute, the rest in order of arrival. Let `m` prompts share
budgets of at least `b` tokens per step, and `k` be what one of them has left. Then that one ends

- within `ceil(m * k / (b // 2))` steps if nothing shorter arrives meanwhile: each other prompt goes before it with
  at most `k` tokens of the shortest-first half; so a short prompt never waits for a long one;
- within `ceil(s / (b - b // 2))` steps whatever arrives, `s` being what it and all earlier arrivals have left: a
  long prompt never waits for a stream of short ones.

Prompts of equal length are served one after the other, which is best for their mean time to first token.
"""

from __future__ import annotations

from collections.abc import Sequence


def share_out(num_pending: Sequence[int], budget: int) -> list[int]:
    """Tokens that each prompt computes in one step.

    Args:
        num_pending: What each prompt has left, in order of arrival.
        budget: Tokens of the step; all of them are used if there is enough to compute.
    """
    shares = [0] * len(num_pending)
    by_length = sorted(range(len(num_pending)), key=lambda index: num_pending[index])
    left = budget - _fill(shares, num_pending, by_length, budget // 2)
    _fill(shares, num_pending, range(len(num_pending)), left)
    return shares


def _fill(shares: list[int], num_pending: Sequence[int], order: Sequence[int], budget: int) -> int:
    """Raise shares in this order; returns the tokens used."""
    left = budget
    for index in order:
        if not left:
            break
        num_more = min(left, num_pending[index] - shares[index])
        shares[index] += num_more
        left -= num_more
    return budget - left
