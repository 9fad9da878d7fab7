"""What the workers tell of a request while and after it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What the workers told with a request's first token; seconds as they measured them, 0 where it did not happen.

    Attributes:
        num_cached_tokens: Prompt tokens that the worker that prefilled did not compute.
        queue_s: Arrival at that worker to its first step.
        prefill_s: First step to the first token, onboarding excluded.
        transfer_s: KV from the prefill to the decode worker.
        onboarded_blocks: By tier, blocks that the worker that prefilled brought up from there, device first; empty if
            none were, or nobody said.
        onboard_s: And how long that took.
    """

    num_cached_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float = 0.0
    onboarded_blocks: tuple[int, ...] = ()
    onboard_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended: whether it completed, its output tokens, and first token to last."""

    is_completed: bool
    num_output_tokens: int = 0
    decode_s: float = 0.0
