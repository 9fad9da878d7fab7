"""A mixture of experts: each token goes through the few MLPs that a router chooses for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from kelp.executor.torch.decoder_config import ExpertsConfig
from kelp.executor.torch.layer import GatedMlp


class ExpertsMlp:
    """Weighted sum of the chosen experts, added up in the order of their indices as transformers does.

    Reads the choice on the host, so a step of such a model cannot be captured in a graph.
    """

    def __init__(self, router: torch.Tensor, experts: Sequence[GatedMlp], config: ExpertsConfig) -> None:
        """Args: `router` `[num_experts, hidden_size]`."""
        self._router = router
        self._experts = tuple(experts)
        self._config = config

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Args: `hidden` `[num_tokens, hidden_size]`, normalised; returns the same shape."""
        weights, chosen = self._route(hidden)
        # Sorted by expert, so that each one's tokens are a slice; stable, so that they stay in order.
        by_expert = torch.argsort(chosen.flatten(), stable=True)
        rows = by_expert // self._config.num_chosen
        row_weights = weights.flatten()[by_expert, None]
        counts = torch.bincount(chosen.flatten(), minlength=self._config.num_experts).tolist()
        out = torch.zeros_like(hidden)
        start = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                own = slice(start, start + count)
                answer = expert(hidden[rows[own]]) * row_weights[own]
                out.index_add_(0, rows[own], answer.to(out.dtype))
            start += count
        return out

    def _route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices of each token's experts, each `[num_tokens, num_chosen]`."""
        probabilities = torch.softmax(linear(hidden, self._router).float(), dim=-1)
        weights, chosen = torch.topk(probabilities, self._config.num_chosen, dim=-1)
        if self._config.is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (weights.to(hidden.dtype) if self._config.is_rounded else weights), chosen
