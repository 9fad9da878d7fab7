"""The choice itself, for all rows of a batch at once and on the device that holds the logits.

Waits for nothing: what depends on the requests is planned on the host beforehand, what depends on the logits stays in
tensors. A row's choice is a function of that row alone; whatever is done for another row's sake leaves it untouched.

Of equal probabilities the one with the lowest id counts as the larger, as `argmax` has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kelp.core.messages import SamplingParams
from kelp.executor.batching.batch import SamplePoint
from kelp.executor.torch.noise import exponential_noise, noise_key
from kelp.executor.torch.staging import stage

_MAX_RANKED = 1024
"""Rows that want no more candidates than this have only so many put in order, the others the vocabulary."""

_SLAB_NUMBERS = {"cpu": 2**16, "cuda": 2**23}
"""Rows times vocabulary that are drawn from at a time: on the host what its caches hold, on a device what bounds the
temporaries, 64 MB for each float64 one."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Rows that are drawn in the same way; all tensors `[num_draws, 1]` but `rows`.

    Attributes:
        num_ranked: Candidates that must be put in order: 0 where neither top_k nor top_p asks for it, None for all.
        rows: `[num_draws] int64`, in the batch.
        keys: Int64, of `noise_key`.
        top_k: Int64; more than any vocabulary for none.
        temperature: Fp32.
        min_p: Fp32, 0 for none.
        top_p: Float64, 1 for none.
    """

    num_ranked: int | None
    rows: torch.Tensor
    keys: torch.Tensor
    top_k: torch.Tensor
    temperature: torch.Tensor
    min_p: torch.Tensor
    top_p: torch.Tensor

    def part(self, first: int, end: int) -> Draws:
        """The draws `[first, end)`."""
        tensors = (self.rows, self.keys, self.top_k, self.temperature, self.min_p, self.top_p)
        return Draws(self.num_ranked, *(tensor[first:end] for tensor in tensors))


def plan_draws(points: Sequence[SamplePoint], device: torch.device) -> list[Draws]:
    """What `choose` needs for the points with a temperature."""
    kinds: dict[int, list[int]] = defaultdict(list)
    for row, point in enumerate(points):
        if point.params.temperature > 0:
            kinds[_kind(point.params)].append(row)
    return [_draws(kind, rows, points, device) for kind, rows in kinds.items()]


_UNRANKED, _FEW, _ALL = range(3)
_NO_TOP_K = 2**62


def _kind(params: SamplingParams) -> int:
    if params.top_k <= 0:
        return _ALL if params.top_p < 1 else _UNRANKED
    return _FEW if params.top_k <= _MAX_RANKED else _ALL


def _draws(kind: int, rows: list[int], points: Sequence[SamplePoint], device: torch.device) -> Draws:
    params = [points[row].params for row in rows]
    keys = [noise_key(points[row].params.seed, len(points[row].output)) for row in rows]
    top_ks = [each.top_k if each.top_k > 0 else _NO_TOP_K for each in params]
    whole = np.asarray([rows, keys, top_ks], np.int64)
    fractions = [
        [each.temperature for each in params],
        [each.min_p for each in params],
        [each.top_p for each in params],
    ]
    staged = stage(np.concatenate((whole, np.asarray(fractions, np.float64).view(np.int64))), device)
    temperature, min_p, top_p = staged[3:].view(torch.float64)[:, :, None]
    return Draws(
        num_ranked={_UNRANKED: 0, _FEW: max(top_ks), _ALL: None}[kind],
        rows=staged[0],
        keys=staged[1][:, None],
        top_k=staged[2][:, None],
        temperature=temperature.float(),
        min_p=min_p.float(),
        top_p=top_p,
    )


def choose(logits: torch.Tensor, plan: Sequence[Draws]) -> torch.Tensor:
    """Token ids `[num_rows] int64`: the largest logit, or what the row's draw yields.

    Args:
        logits: `[num_rows, vocab_size] fp32`; not modified.
        plan: From `plan_draws` for the same rows.
    """
    chosen = logits.argmax(dim=-1)
    slab = max(1, _SLAB_NUMBERS[logits.device.type] // logits.shape[1])
    for draws in plan:
        for first in range(0, len(draws.rows), slab):
            part = draws.part(first, first + slab)
            chosen[part.rows] = _draw(logits[part.rows], chosen[part.rows], part)
    return chosen


def _draw(logits: torch.Tensor, largest: torch.Tensor, draws: Draws) -> torch.Tensor:
    scaled = (logits - logits.gather(1, largest[:, None])) / draws.temperature
    probabilities = torch.softmax(scaled, dim=-1)
    is_kept = probabilities >= draws.min_p * probabilities.amax(dim=-1, keepdim=True)
    kept = torch.where(is_kept, probabilities, 0.0)
    if draws.num_ranked == 0:
        token_ids = torch.arange(kept.shape[1], device=kept.device)
    else:
        kept, token_ids = _rank(kept, draws.num_ranked)
        kept = _filter_ranked(kept, draws)
    race = torch.where(kept > 0, kept.double() / exponential_noise(draws.keys, token_ids), -1.0)
    fastest, place = race.max(dim=-1)
    winner = token_ids.expand_as(race).gather(1, place[:, None])[:, 0]
    # Extreme penalties overflow, and bans may cover everything: no distribution is left to draw from.
    return torch.where(fastest >= 0, winner, largest)


def _rank(kept: torch.Tensor, num_ranked: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probabilities of each row in falling order, and their ids; of equal ones the lowest id first."""
    vocab_size = kept.shape[1]
    if num_ranked is None or num_ranked >= vocab_size:
        ordered = kept.sort(dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    # Among equals `topk` picks any, so the id goes into the number: floats from 0 up are ordered as their bits are.
    token_ids = torch.arange(vocab_size, device=kept.device)
    numbers = (kept.view(torch.int32).long() << 32) + (vocab_size - 1 - token_ids)
    best = numbers.topk(num_ranked, dim=-1).values
    return (best >> 32).int().view(torch.float32), vocab_size - 1 - (best & 0xFFFFFFFF)


def _filter_ranked(kept: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Probabilities `[num_rows, num_ranked]` in falling order that top_k, then top_p leave; 0 for the others."""
    ranks = torch.arange(kept.shape[1], device=kept.device)
    kept = torch.where(ranks < draws.top_k, kept, 0.0)
    mass = kept.double().cumsum(dim=-1)
    is_kept = (mass - kept < draws.top_p * mass[:, -1:]) | (draws.top_p >= 1)
    return torch.where(is_kept, kept, 0.0)
