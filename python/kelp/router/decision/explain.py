"""Why a request went where it went, and whether what was predicted came true.

Decisions are kept as the arrays that the policy saw and rendered only when somebody asks; the prompt is not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kelp.core.types import Role
from kelp.core.wire import Message
from kelp.router.decision.costs import Costs
from kelp.router.decision.outcome import Ended, FirstToken

# What CPython and numpy take, checked against tracemalloc in the tests.
_DECISION_BYTES = 1500
_CHOICE_BYTES = 1700
_CANDIDATE_BYTES = 176
_CHOICE_TIERS_BYTES = 400
_CANDIDATE_TIERS_BYTES = 32

State = Literal["selected", "reserved", "committed", "running", "completed", "failed", "lapsed"]


class CandidateCosts(Message):
    """One candidate as the policy saw it; seconds are predictions.

    Attributes:
        overlap_blocks: By tier, cumulative: leading prompt blocks in this tier or a faster one, device first. Lower
            tiers are those of the worker's KV block manager; one entry where they hold nothing more for anybody.
        hold_up_s: By how much it would make prompts wait that are there already.
    """

    worker_id: str
    overlap_blocks: list[int]
    num_active: float
    num_decoding: float
    pending_prefill_tokens: float
    active_blocks: float
    uncached_tokens: float
    queue_s: float
    hold_up_s: float
    prefill_s: float
    onboard_s: float
    transfer_s: float
    itl_s: float
    factor: float


class RoleChoice(Message):
    """One choice among workers of a role."""

    role: Role
    chosen: str
    candidates: list[CandidateCosts]


class Outcome(Message):
    """What came of it; seconds as the workers measured them, blocks by tier, device first."""

    ttft_s: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    transfer_s: float | None = None
    num_cached_tokens: int | None = None
    onboarded_blocks: list[int] | None = None
    onboard_s: float | None = None
    itl_s: float | None = None
    num_output_tokens: int | None = None
    state: State = "selected"


class Explanation(Message):
    """A decision and its outcome.

    Attributes:
        decided_s: Value of the router's monotonic clock.
        reason: Why disaggregated or not, and what narrowed the choice, in words.
        attempt: 1 for the first decision of this request id, counting on with every retry.
        predicted_ttft_s: Of the way taken.
        predicted_onboarded_blocks: By tier, device first, blocks that the worker which computes the prompt shall bring
            up from there; empty if none.
        router_id: Which router decided; empty where there is only one.
    """

    request_id: str
    decided_s: float
    policy: str
    is_measured: bool
    reason: str
    attempt: int
    num_prompt_tokens: int
    num_prompt_blocks: int
    predicted_ttft_s: float
    predicted_itl_s: float
    choices: list[RoleChoice]
    outcome: Outcome
    predicted_onboarded_blocks: list[int] = []
    router_id: str = ""


@dataclass(slots=True)
class Choice:
    """One choice as arrays.

    Attributes:
        worker_ids: By slot, as they were then.
    """

    role: Role
    costs: Costs
    row: int
    worker_ids: tuple[str, ...]


@dataclass(slots=True)
class Decided:
    """A decision as it is kept."""

    request_id: str
    num_prompt_blocks: int
    decided_s: float
    reason: str
    choices: tuple[Choice, ...]
    ttft_s: float
    itl_s: float
    attempt: int = 1
    state: State = "selected"
    told: FirstToken | None = None
    first_token_s: float | None = None
    ended: Ended | None = None

    @property
    def num_bytes(self) -> int:
        """Estimated memory."""
        num_bytes = _DECISION_BYTES + len(self.choices) * _CHOICE_BYTES
        for choice in self.choices:
            num_candidates = len(choice.costs)
            num_bytes += num_candidates * _CANDIDATE_BYTES
            if choice.costs.overlap_tiers is not None:
                num_bytes += _CHOICE_TIERS_BYTES + num_candidates * _CANDIDATE_TIERS_BYTES
        return num_bytes


class DecisionLog:
    """The last decisions, within so many bytes; belongs to one event loop."""

    def __init__(self, policy: str, max_bytes: int) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._decided: OrderedDict[str, Decided] = OrderedDict()

    def add(self, decided: Decided) -> None:
        """Keep a decision, the previous one for this request id no longer."""
        before = self._decided.pop(decided.request_id, None)
        if before is not None:
            self.num_bytes -= before.num_bytes
            decided.attempt = before.attempt + 1
        self._decided[decided.request_id] = decided
        self.num_bytes += decided.num_bytes
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._decided.popitem(last=False)[1].num_bytes

    def find(self, request_id: str) -> Decided | None:
        """For filling in what came of it; None if it is too old."""
        return self._decided.get(request_id)

    def explain(self, request_id: str) -> Explanation | None:
        """The last decision for this request id; None if it is unknown or too old."""
        decided = self._decided.get(request_id)
        if decided is None:
            return None
        first = decided.choices[0].costs
        return Explanation(
            request_id=request_id,
            decided_s=decided.decided_s,
            policy=self._policy,
            is_measured=first.is_measured,
            reason=decided.reason,
            attempt=decided.attempt,
            num_prompt_tokens=int(first.num_prompt_tokens),
            num_prompt_blocks=decided.num_prompt_blocks,
            predicted_ttft_s=decided.ttft_s,
            predicted_itl_s=decided.itl_s,
            choices=[_render(choice) for choice in decided.choices],
            outcome=_outcome(decided),
            predicted_onboarded_blocks=list(first.onboarded(decided.choices[0].row)),
        )


def _render(choice: Choice) -> RoleChoice:
    costs = choice.costs
    ids = [choice.worker_ids[slot] for slot in costs.slots.tolist()]
    tiers = costs.overlap_tiers.tolist() if costs.overlap_tiers is not None else [[n] for n in costs.overlap.tolist()]
    factors = np.broadcast_to(costs.factor, len(ids)).tolist()
    return RoleChoice(
        role=choice.role,
        chosen=ids[choice.row],
        candidates=[
            CandidateCosts(
                worker_id=worker_id,
                overlap_blocks=tiers[row],
                num_active=costs.active[row],
                num_decoding=costs.num_decoding[row],
                pending_prefill_tokens=costs.pending_tokens[row],
                active_blocks=costs.kv_tokens[row] / costs.block_size[row],
                uncached_tokens=costs.uncached[row],
                queue_s=costs.queue_s[row],
                hold_up_s=costs.hold_up_s[row],
                prefill_s=costs.prefill_s[row],
                onboard_s=costs.onboard_s[row],
                transfer_s=costs.transfer_s[row],
                itl_s=costs.itl_s[row],
                factor=factors[row],
            )
            for row, worker_id in enumerate(ids)
        ],
    )


def _outcome(decided: Decided) -> Outcome:
    told, ended = decided.told, decided.ended
    num_intervals = max(ended.num_output_tokens - 1, 1) if ended else 1
    return Outcome(
        state=decided.state,
        ttft_s=None if decided.first_token_s is None else decided.first_token_s - decided.decided_s,
        queue_s=told.queue_s if told else None,
        prefill_s=told.prefill_s if told else None,
        transfer_s=told.transfer_s if told else None,
        num_cached_tokens=told.num_cached_tokens if told else None,
        onboarded_blocks=list(told.onboarded_blocks) if told else None,
        onboard_s=told.onboard_s if told else None,
        itl_s=ended.decode_s / num_intervals if ended else None,
        num_output_tokens=ended.num_output_tokens if ended else None,
    )
