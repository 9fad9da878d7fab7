"""Whether a prefill worker pays for one request, by what both ways are predicted to take."""

from __future__ import annotations

from typing import NamedTuple

from kelp.router.decision.costs import Costs
from kelp.timing.rates import Rates


class Weights(NamedTuple):
    """What a second of each is worth, in seconds of time to first token: see `RoutingConfig`."""

    itl: float
    stall: float


class Ways(NamedTuple):
    """Candidates of each role and the row that was chosen; `alone` and `decode` are the same candidates.

    Attributes:
        alone: That would do everything,
        prefill: that would compute the prompt,
        decode: and that would then fetch its KV.
        max_tokens: Most tokens to be generated.
    """

    alone: tuple[Costs, int]
    prefill: tuple[Costs, int]
    decode: tuple[Costs, int]
    max_tokens: int


def pays(rates: Rates, ways: Ways, weights: Weights) -> bool:
    """Whether computing the prompt at a prefill worker is faster for all concerned.

    Compared are predicted completions, with the stall that the prompt causes to answers at the worker that computes it.
    Before prompts and handoffs have been measured it is taken to be faster: that is what prefill workers were started
    for.
    """
    if not (rates.is_measured and rates.is_transfer_measured):
        return True
    (alone, row), (prefill, prefill_row), (decode, decode_row) = ways.alone, ways.prefill, ways.decode
    num_intervals = max(min(alone.usual_output, float(ways.max_tokens)) - 1.0, 0.0)
    # Both by what will generate there, prompts under way elsewhere included: else they could not be compared.
    longer_s = num_intervals * float(decode.itl_s[decode_row] - decode.itl_s[row])
    stall_s = float(alone.compute_s[row] * alone.num_decoding[row])
    together_s = float(prefill.ttft_s[prefill_row]) + float(decode.transfer_s[decode_row]) + weights.itl * longer_s
    return together_s <= float(alone.ttft_s[row]) + weights.stall * stall_s
