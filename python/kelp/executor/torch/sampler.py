"""From logits to tokens.

Order of operations as in vLLM: bans, penalties, temperature, min_p, top_k, top_p, choice. Each row is treated
alone, so a token is a function of its own logits, parameters, history and seed, never of the batch around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kelp.core.messages import SamplingParams
from kelp.executor.torch.batch import Sampled, SamplePoint
from kelp.executor.torch.noise import exponential_noise


def sample(logits: torch.Tensor, points: Sequence[SamplePoint]) -> list[Sampled]:
    """Choose one token per row.

    Args:
        logits: `[num_rows, vocab_size]`, any float type; not modified.
        points: One per row.
    """
    if not points:
        return []
    exact = logits.float()
    chosen = exact.argmax(dim=-1)
    for row, point in enumerate(points):
        if not _is_plain_greedy(point):
            chosen[row] = _choose(exact[row].clone(), point)
    log_probs = torch.log_softmax(exact, dim=-1).gather(1, chosen[:, None])[:, 0]
    return [Sampled(token_id, log_prob) for token_id, log_prob in zip(chosen.tolist(), log_probs.tolist(), strict=True)]


def _is_plain_greedy(point: SamplePoint) -> bool:
    params = point.params
    return (
        params.temperature == 0
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and not params.bad_words_ids
        and not _is_stop_banned(point)
    )


def _is_stop_banned(point: SamplePoint) -> bool:
    return len(point.output) < point.params.min_tokens and bool(point.stop_token_ids)


def _choose(logits: torch.Tensor, point: SamplePoint) -> int:
    """Token id for one row `[vocab_size] fp32`, which is modified."""
    banned = [token_id for token_id in _banned_ids(point) if token_id < len(logits)]
    if banned:
        logits[banned] = -torch.inf
    _penalise(logits, point)
    params = point.params
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
    kept = _filter(probabilities, params)
    if not len(kept):
        # Extreme penalties overflow, and bans may cover everything: no distribution is left to draw from.
        return int(logits.argmax())
    token_ids = kept.cpu().numpy()
    noise = exponential_noise(params.seed, len(point.output), token_ids)
    race = probabilities[kept].cpu().numpy() / noise
    return int(token_ids[race.argmax()])


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


def _filter(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Ids `[num_candidates] int64` that min_p, top_k and top_p leave; empty only for NaN."""
    kept = torch.nonzero(probabilities > 0)[:, 0]
    if params.min_p > 0:
        kept = kept[probabilities[kept] >= params.min_p * probabilities.max()]
    if 0 < params.top_k < len(kept):
        kept = kept[probabilities[kept].topk(params.top_k).indices]
    if params.top_p < 1:
        ordered, order = probabilities[kept].sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        kept = kept[order[before < params.top_p * ordered.sum()]]
    return kept
