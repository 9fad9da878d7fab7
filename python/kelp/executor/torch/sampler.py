"""From logits to tokens.

Order of operations as in vLLM: guide, bans, penalties, temperature, min_p, top_k, top_p, choice. Bans and penalties
depend on a row's history and are applied here, row by row, guides to all their rows at once; the rest is
`device_sampler`'s. A token is a function of its own logits, parameters, history and seed, never of the batch around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kelp.executor.batching.batch import Sampled, SamplePoint
from kelp.executor.torch.device_sampler import Draws, choose, plan_draws
from kelp.executor.torch.native.kernels import kernels_for
from kelp.executor.torch.staging import stage

_WORD_BITS = 32


def sample(logits: torch.Tensor, points: Sequence[SamplePoint]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: `[num_rows, vocab_size]`, any float type; not modified.
        points: One per row.
    """
    if not points:
        return []
    kernels = kernels_for(logits)
    if kernels is not None and all(_is_plain_greedy(point) for point in points):
        chosen, log_probs = kernels.greedy(logits)
    else:
        chosen, log_probs = sample_rows(logits, points, plan_draws(points, logits.device))
    return [Sampled(token_id, log_prob) for token_id, log_prob in zip(chosen.tolist(), log_probs.tolist(), strict=True)]


def sample_rows(
    logits: torch.Tensor, points: Sequence[SamplePoint], draws: Sequence[Draws]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `sample`, on the logits' device; the host waits only where a row is restricted or penalised.

    Args:
        logits: `[num_rows, vocab_size]`, any float type; not modified.
        points: One per row, at least one.
        draws: From `plan_draws` for `points`.

    Returns:
        Token ids `[num_rows] int64` and their log-probabilities under the raw logits `[num_rows] fp32`.
    """
    exact = logits.float()
    changed = [row for row, point in enumerate(points) if _changes_logits(point)]
    guided = [row for row, point in enumerate(points) if point.allowed is not None]
    adjusted = exact.clone() if changed or guided else exact
    if guided:
        masks = [points[row].allowed for row in guided]
        adjusted[guided] = adjusted[guided].masked_fill(_forbidden(masks, adjusted), -torch.inf)
    for row in changed:
        _adjust(adjusted[row], points[row])
    chosen = choose(adjusted, draws)
    return chosen, torch.log_softmax(exact, dim=-1).gather(1, chosen[:, None])[:, 0]


def _forbidden(masks: Sequence[npt.NDArray[np.int32] | None], logits: torch.Tensor) -> torch.Tensor:
    """`[num_masks, vocab_size] bool` on the logits' device: the tokens whose bit is not set."""
    words = stage(np.stack([mask for mask in masks if mask is not None]), logits.device)
    places = torch.arange(_WORD_BITS, dtype=torch.int32, device=logits.device)
    bits = words[:, :, None].bitwise_right_shift(places).bitwise_and(1)
    return bits.flatten(1)[:, : logits.shape[1]] == 0


def _is_plain_greedy(point: SamplePoint) -> bool:
    return point.params.temperature == 0 and point.allowed is None and not _changes_logits(point)


def _changes_logits(point: SamplePoint) -> bool:
    params = point.params
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.bad_words_ids
        or _is_stop_banned(point)
    )


def _is_stop_banned(point: SamplePoint) -> bool:
    return len(point.output) < point.params.min_tokens and bool(point.stop_token_ids)


def _adjust(logits: torch.Tensor, point: SamplePoint) -> None:
    """Ban and penalise in one row `[vocab_size] fp32`; where nothing is left that a guide allows, its word stands."""
    banned = [token_id for token_id in _banned_ids(point) if token_id < len(logits)]
    if banned:
        spared = logits[banned]
        logits[banned] = -torch.inf
        if point.allowed is not None and bool(logits.max() == -torch.inf):
            logits[banned] = spared
    _penalise(logits, point)


def _banned_ids(point: SamplePoint) -> set[int]:
    """Stop ids before `min_tokens`, and the last id of each bad word whose beginning the output ends with."""
    banned = set(point.stop_token_ids) if _is_stop_banned(point) else set()
    output = point.output
    for word in point.params.bad_words_ids:
        num_before = len(word) - 1
        if word and num_before <= len(output) and output[len(output) - num_before :].tolist() == [*word[:-1]]:
            banned.add(word[-1])
    return banned


def _penalise(logits: torch.Tensor, point: SamplePoint) -> None:
    """Repetition counts prompt and output, presence and frequency the output only (as vLLM does)."""
    params = point.params
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(point.tokens).astype(np.int64)).to(logits.device)
        values = logits[seen]
        divided, multiplied = values / params.repetition_penalty, values * params.repetition_penalty
        logits[seen] = torch.where(values > 0, divided, multiplied)
    if (params.presence_penalty or params.frequency_penalty) and len(point.output):
        token_ids, counts = np.unique(point.output, return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * counts
        index = torch.from_numpy(token_ids.astype(np.int64)).to(logits.device)
        logits[index] -= torch.from_numpy(penalty).to(logits)
