"""The timing model of a worker: what the mock executor and the simulator take as the truth.

Linear in what dominates: a step costs a constant (reading the weights once), plus each new token, plus each pair of a
new token and a token before it (attention). That is the shape of the roofline for prefill (compute-bound) and decode
(bandwidth-bound) alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kelp.core.types import Tier


@dataclass(frozen=True, slots=True)
class TimingModel:
    """Costs of one worker, in seconds.

    Attributes:
        step_s: Every step.
        prefill_token_s: Each prompt token computed.
        attention_pair_s: Each prompt token computed, times the tokens before it.
        decode_sequence_s: Each decoding sequence of a step.
        decode_context_s: Each token of KV that a decoding sequence reads in a step.
        transfer_s: Each transfer of KV between workers.
        transfer_block_s: Each block of it.
        onboard_s: Each onboarding from a lower tier; by `Tier`, the first entry unused.
        onboard_block_s: Each block of it; by `Tier` as well.
    """

    step_s: float = 8e-3
    prefill_token_s: float = 5e-5
    attention_pair_s: float = 2e-9
    decode_sequence_s: float = 5e-5
    decode_context_s: float = 5e-8
    transfer_s: float = 2e-3
    transfer_block_s: float = 1e-4
    onboard_s: tuple[float, float, float, float] = (0.0, 5e-4, 2e-3, 2e-2)
    onboard_block_s: tuple[float, float, float, float] = (0.0, 1e-4, 6e-4, 3e-3)

    def batch_s(self, prefills: Iterable[tuple[int, int]], decode_contexts: Iterable[int]) -> float:
        """One step.

        Args:
            prefills: `(num_new_tokens, num_tokens_before)` of each prompt chunk.
            decode_contexts: Tokens that each decoding sequence has.
        """
        seconds = self.step_s
        for num_new, num_before in prefills:
            num_pairs = num_new * num_before + num_new * num_new // 2
            seconds += num_new * self.prefill_token_s + num_pairs * self.attention_pair_s
        for num_context in decode_contexts:
            seconds += self.decode_sequence_s + num_context * self.decode_context_s
        return seconds

    def prefill_s(self, num_new: int, num_before: int) -> float:
        """A prompt's remainder alone on the worker, in one step."""
        return self.batch_s([(num_new, num_before)], [])

    def handoff_s(self, num_blocks: int) -> float:
        """KV of `num_blocks` blocks from one worker to another."""
        return self.transfer_s + num_blocks * self.transfer_block_s if num_blocks else 0.0

    def tier_s(self, tier: Tier, num_blocks: int) -> float:
        """Onboarding `num_blocks` blocks from a lower tier."""
        return self.onboard_s[tier] + num_blocks * self.onboard_block_s[tier] if num_blocks else 0.0

    def scaled(self, factor: float) -> TimingModel:
        """The same worker, `factor` times as slow."""
        return TimingModel(
            step_s=self.step_s * factor,
            prefill_token_s=self.prefill_token_s * factor,
            attention_pair_s=self.attention_pair_s * factor,
            decode_sequence_s=self.decode_sequence_s * factor,
            decode_context_s=self.decode_context_s * factor,
            transfer_s=self.transfer_s * factor,
            transfer_block_s=self.transfer_block_s * factor,
            onboard_s=_times(self.onboard_s, factor),
            onboard_block_s=_times(self.onboard_block_s, factor),
        )


def _times(costs: tuple[float, float, float, float], factor: float) -> tuple[float, float, float, float]:
    device, host, disk, object_store = costs
    return device * factor, host * factor, disk * factor, object_store * factor
