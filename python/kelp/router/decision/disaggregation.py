"""Whether a prefill worker pays for one request, by what both ways are predicted to take."""

from __future__ import annotations

from kelp.router.decision.costs import Costs
from kelp.timing.rates import Rates

_STALL_WEIGHT = 0.5
"""Seconds of stall that one sequence suffers, in seconds of time to first token."""


def pays(rates: Rates, aggregated: tuple[Costs, int], prefill: tuple[Costs, int], decode: tuple[Costs, int]) -> bool:
    """Whether computing the prompt at a prefill worker is faster for all concerned.

    Before prompts and handoffs have been measured it is taken to be: that is what prefill workers were started for.

    Args:
        rates: Tell whether there is anything to predict from.
        aggregated: Candidates and the row that would do everything,
        prefill: that would compute the prompt,
        decode: and that would then fetch its KV.
    """
    if not (rates.is_measured and rates.is_transfer_measured):
        return True
    alone, row = aggregated
    stall_s = float(alone.compute_s[row] * alone.num_decoding[row]) * _STALL_WEIGHT
    together_s = float(prefill[0].ttft_s[prefill[1]]) + float(decode[0].transfer_s[decode[1]])
    return together_s <= float(alone.ttft_s[row]) + stall_s
