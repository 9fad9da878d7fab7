"""What serving a request would cost at each candidate: the one record that all policies choose by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kelp.router.decision.fleet import Candidates, Fleet, Slots
from kelp.router.decision.lengths import AnswerLengths
from kelp.router.decision.load import Load
from kelp.router.decision.prompt_order import PromptOrder
from kelp.router.decision.request import RoutingRequest
from kelp.router.index.base import Matches
from kelp.timing.rates import Rates

Column = npt.NDArray[np.float64]
Tiers = npt.NDArray[np.int32]
"""`[n, num_tiers]`, cumulative: blocks in this tier or a faster one."""


@dataclass(slots=True)
class Costs:
    """Arrays over candidates; `[n] float64` unless said otherwise.

    Attributes:
        slots: `[n] intp`.
        num_prompt_tokens: Of the request that is to be placed.
        usual_output: Output tokens that a request is expected to generate.
        is_measured: Whether the seconds rest on measurements.
        computes_prompt: False for decode workers that get the prompt's KV from a prefill worker.
        active: Requests there, the ones that only heartbeats tell of included.
        pending_tokens: Prompt tokens still to be computed there.
        kv_tokens: KV of active requests.
        num_decoding: Sequences that generate.
        block_size: Tokens per block.
        placed_tokens: Prompt tokens computed there of late: how much of its cache is recent.
        overlap: Leading prompt blocks that lie there in any tier.
        overlap_tiers: The same by tier; None where nothing lies below the device tier.
        used_tiers: Those of them that need not be computed: deeper ones, where bringing them up takes longer than
            computing them, are left out.
        uncached: Prompt tokens to be computed there.
        steps: Engine steps that those take.
        compute_s: The worker's time that they take, without the sequences that decode in the same steps.
        in_order_s: What waiting takes if prompts are computed in order of arrival,
        shared_s: and if they share the steps: none waits for more of another one than it is long itself.
        queue_s: Expected wait, between the two.
        hold_up_s: By how much it makes prompts wait that came before it, summed up.
        prefill_s: From then to its first token, onboarding excluded.
        onboard_s: From lower tiers.
        transfer_s: KV from the prefill worker.
        ttft_s: Until its first token: the sum of these.
        itl_s: Between its tokens.
        factor: Below 1 for workers that preferred tags or the session favour.
    """

    slots: npt.NDArray[np.intp]
    num_prompt_tokens: float
    usual_output: float
    is_measured: bool
    computes_prompt: bool
    active: Column
    pending_tokens: Column
    kv_tokens: Column
    num_decoding: Column
    block_size: Column
    placed_tokens: Column
    overlap: Column
    overlap_tiers: Tiers | None
    used_tiers: Tiers | None
    uncached: Column
    steps: Column
    compute_s: Column
    in_order_s: Column
    shared_s: Column
    queue_s: Column
    hold_up_s: Column
    prefill_s: Column
    onboard_s: Column
    transfer_s: Column
    ttft_s: Column
    itl_s: Column
    factor: Column | float = 1.0

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def device_overlap(self) -> Column:
        """Leading prompt blocks in the workers' own caches: what one that gets the rest from a prefill worker uses."""
        return self.overlap if self.overlap_tiers is None else self.overlap_tiers[:, 0].astype(np.float64)

    def onboarded(self, row: int) -> tuple[int, ...]:
        """By tier, blocks that the candidate in this row is expected to bring up; empty if there are none."""
        if self.used_tiers is None or not self.computes_prompt:
            return ()
        per_tier = np.diff(self.used_tiers[row])
        return (0, *per_tier.tolist()) if per_tier.any() else ()


class _Overlaps(NamedTuple):
    """Attributes: see `Costs`; `cached` are tokens."""

    overlap: Column
    tiers: Tiers | None
    used: Tiers | None
    cached: Column
    onboard_s: Column


class _Others(NamedTuple):
    """Attributes: see `Costs`; `decode_s` is what their decoding adds to a step."""

    decode_s: Column
    prefill_s: Column
    in_order_s: Column
    shared_s: Column
    queue_s: Column
    hold_up_s: Column


class CostModel:
    """Fills the record from fleet, load, rates and the index's answer."""

    def __init__(self, fleet: Fleet, load: Load, rates: Rates, lengths: AnswerLengths, order: PromptOrder) -> None:
        self._fleet = fleet
        self._load = load
        self._lengths = lengths
        self._order = order
        self.rates = rates

    def estimate(self, request: RoutingRequest, candidates: Candidates, matches: Matches, now_s: float) -> Costs:
        """The prompt is computed and its output generated at one worker."""
        fleet, load, rates, at = self._fleet, self._load, self.rates, candidates.at
        block_size = fleet.block_size[at]
        num_prompt = float(request.num_prompt_tokens)
        overlap, tiers, used, cached, onboard_s = self._overlaps(candidates, matches, num_prompt)
        uncached, steps, compute_s = self._computation(at, cached, num_prompt)
        others = self._others(at, steps, compute_s, now_s)
        return Costs(
            slots=candidates.slots,
            num_prompt_tokens=num_prompt,
            usual_output=self._lengths.usual,
            is_measured=rates.is_measured,
            computes_prompt=True,
            active=load.active[at] + load.foreign[at],
            pending_tokens=load.pending_tokens[at].copy(),
            kv_tokens=load.kv_tokens[at].copy(),
            num_decoding=load.num_decoding[at].copy(),
            block_size=block_size,
            placed_tokens=load.placed_tokens[at].copy(),
            overlap=overlap,
            overlap_tiers=tiers,
            used_tiers=used,
            uncached=uncached,
            steps=steps,
            compute_s=compute_s,
            in_order_s=others.in_order_s,
            shared_s=others.shared_s,
            queue_s=others.queue_s,
            hold_up_s=others.hold_up_s,
            prefill_s=others.prefill_s,
            onboard_s=onboard_s,
            transfer_s=np.zeros(len(candidates.slots)),
            ttft_s=others.queue_s + others.prefill_s + onboard_s,
            itl_s=rates.slowness[at] * (rates.step_s + rates.sequence_s + num_prompt * rates.context_s)
            + others.decode_s,
        )

    def _computation(self, at: Slots | slice, cached: Column, num_prompt: float) -> tuple[Column, Column, Column]:
        """Tokens, steps, and seconds of the worker's time."""
        rates = self.rates
        uncached = num_prompt - cached
        steps = np.maximum(uncached / self._fleet.step_tokens[at], 1.0)
        half_pair_s = 0.5 * rates.pair_s
        per_token_s = half_pair_s * cached + (rates.token_s + half_pair_s * num_prompt)
        return uncached, steps, rates.slowness[at] * (steps * rates.step_s + uncached * per_token_s)

    def _others(self, at: Slots | slice, steps: Column, compute_s: Column, now_s: float) -> _Others:
        """What the requests cost that are there already."""
        load, rates, in_order = self._load, self.rates, self._order.in_order
        if not load.active[at].any():
            # What follows from zeros: a lone request need not wait until they have been added up.
            nothing = np.zeros(len(compute_s))
            return _Others(nothing, compute_s, nothing, nothing, nothing, nothing)
        decode_s = rates.slowness[at] * (
            load.num_decoding[at] * rates.sequence_s + load.context_tokens[at] * rates.context_s
        )
        prefill_s = compute_s + steps * decode_s
        elapsed_s = np.minimum(now_s - load.head_since_s[at], load.head_s[at])
        in_order_s = load.pending_s[at] - elapsed_s + load.pending_steps[at] * decode_s
        shared_s = np.minimum(in_order_s, load.num_pending[at] * prefill_s)
        hold_up_s = (1.0 - in_order) * shared_s
        return _Others(decode_s, prefill_s, in_order_s, shared_s, in_order * in_order_s + hold_up_s, hold_up_s)

    def _overlaps(self, candidates: Candidates, matches: Matches, num_prompt: float) -> _Overlaps:
        """What lies at the candidates, and what of it they will use."""
        at, most = candidates.at, max(num_prompt - 1.0, 0.0)
        nothing = np.zeros(len(candidates.slots))
        if not len(matches.slots):
            return _Overlaps(nothing, None, None, nothing, nothing)
        num_slots, block_size = len(self._fleet.block_size), self._fleet.block_size[at]
        overlap = np.zeros(num_slots)
        overlap[matches.slots] = matches.blocks[:, -1]
        overlap = overlap[at]
        if not (matches.blocks[:, 0] != matches.blocks[:, -1]).any():
            return _Overlaps(overlap, None, None, np.minimum(overlap * block_size, most), nothing)
        tiers = np.zeros((num_slots, matches.blocks.shape[1]), np.int32)
        tiers[matches.slots] = matches.blocks
        tiers = tiers[at]
        used = self._worth_using(at, tiers, num_prompt)
        cached = np.minimum(used[:, -1] * block_size, most)
        return _Overlaps(overlap, tiers, used, cached, self.rates.onboard_s(used))

    def _worth_using(self, at: Slots | slice, tiers: Tiers, num_prompt: float) -> Tiers:
        """Blocks by tier, down to the one where each candidate has its first token soonest."""
        if not self.rates.is_measured:
            return tiers
        options = np.minimum(tiers, tiers.T[:, :, None])
        cached = np.minimum(options[:, :, -1] * self._fleet.block_size[at], max(num_prompt - 1.0, 0.0))
        _, _, compute_s = self._computation(at, cached, num_prompt)
        seconds = compute_s + np.stack([self.rates.onboard_s(option) for option in options])
        used: Tiers = options[seconds.argmin(axis=0), np.arange(len(tiers))]
        return used


def as_decoder(costs: Costs, rates: Rates) -> Costs:
    """The same candidates if another worker computes the prompt: they fetch the blocks that they lack.

    Whoever will generate there counts as if he did already. Prompts of a burst are all still under way elsewhere when
    the last request of it is placed; counting only those that generate now would send all to one worker.
    """
    nothing = np.zeros(len(costs))
    num_sequences = costs.active + 1.0
    num_context = costs.kv_tokens + costs.num_prompt_tokens
    step_s = rates.step_s + num_sequences * rates.sequence_s + num_context * rates.context_s
    num_blocks = np.ceil(costs.num_prompt_tokens / costs.block_size)
    transfer_s = rates.handoff_s(np.maximum(num_blocks - costs.device_overlap, 0.0))
    return replace(
        costs,
        computes_prompt=False,
        uncached=nothing,
        steps=nothing,
        compute_s=nothing,
        in_order_s=nothing,
        shared_s=nothing,
        queue_s=nothing,
        hold_up_s=nothing,
        prefill_s=nothing,
        onboard_s=nothing,
        transfer_s=transfer_s,
        ttft_s=transfer_s,
        itl_s=rates.slowness[costs.slots] * step_s,
    )


def missing_blocks(costs: Costs, row: int) -> float:
    """Blocks of the prompt's KV that the candidate in this row lacks."""
    num_blocks = math.ceil(costs.num_prompt_tokens / float(costs.block_size[row]))
    return max(num_blocks - float(costs.device_overlap[row]), 0.0)
