"""One decision from filters to workers: aggregated or disaggregated, and which.

Knows policies by their interface alone and changes nothing but their turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np

from kelp.core.config import PolicyName, RoutingConfig
from kelp.core.errors import NoWorker
from kelp.core.types import Role, WorkerKey
from kelp.router.decision.costs import CostModel, Costs, as_decoder, missing_blocks
from kelp.router.decision.disaggregation import Ways, Weights, pays
from kelp.router.decision.eligibility import conditions_of, is_pinned, narrow, tag_factors
from kelp.router.decision.explain import Choice
from kelp.router.decision.fleet import Candidates, Fleet
from kelp.router.decision.policies.among_the_best import AmongTheBestPolicy
from kelp.router.decision.policies.base import CostPolicy
from kelp.router.decision.policies.catalogue import new_policy
from kelp.router.decision.prompt_order import Waits
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.workers import WorkerTable
from kelp.router.index.base import Matches
from kelp.timing.rates import Work

_BLIND_POLICIES = ("round-robin", "random", "power-of-two")
"""They do not herd on counts that are out of date."""

_NO_ROWS = np.zeros(0, np.intp)
_SESSION_SLACK = 1.5
_SESSION_SLACK_S = 0.1


@dataclass(frozen=True, slots=True)
class SelectorMode:
    """The two fields of `router` that concern the decision."""

    policy: PolicyName = "kelp"
    disaggregation: Literal["auto", "always", "never"] = "auto"


@dataclass(slots=True, eq=False)
class Question:
    """What is to be decided.

    Attributes:
        avoid: See `Selector.select`.
        allow_prefill: See there.
        session: The worker that served the request's session last.
        now_s: Value of the router's monotonic clock.
        is_stale: Whether the counts are not to be trusted.
    """

    request: RoutingRequest
    matches: Matches
    avoid: frozenset[WorkerKey]
    allow_prefill: bool
    session: WorkerKey | None
    now_s: float
    is_stale: bool = False


@dataclass(slots=True, eq=False)
class Way:
    """Slots to use and what is expected of them; `prefill_slot` None: aggregated.

    Attributes:
        choices: What was chosen from, prefill first.
        work: The prompt's computation, `work_s` its predicted seconds.
        waits: What was predicted of the prompt.
        transfer_blocks: Blocks that the decode worker has to fetch.
        overlap_blocks: Leading blocks of the prompt that the worker which computes it has in any tier.
        onboarded_blocks: By tier, those that it is expected to bring up from there, device first; empty if none.
    """

    decode_slot: int
    prefill_slot: int | None
    choices: tuple[Choice, ...]
    reason: str
    work: Work
    work_s: float
    waits: Waits
    transfer_blocks: float
    overlap_blocks: float
    onboarded_blocks: tuple[int, ...]
    ttft_s: float
    itl_s: float


class Chooser:
    """Asks the policy, once per role that is needed."""

    def __init__(
        self, table: WorkerTable, fleet: Fleet, costs: CostModel, config: RoutingConfig, mode: SelectorMode, seed: int
    ) -> None:
        self._table = table
        self._fleet = fleet
        self._costs = costs
        self._config = config
        self._disaggregation = mode.disaggregation
        self._weights = Weights(config.disaggregation_itl_weight, config.disaggregation_stall_weight)
        self._rng = Random(seed)
        self._counts_load = mode.policy not in _BLIND_POLICIES
        self._when_stale = AmongTheBestPolicy()
        self._alone, self._decode, self._prefill = (
            new_policy(mode.policy, config.policy_parameters, config.temperature) for _ in range(3)
        )

    def choose(self, question: Question) -> Way:
        """Choose for one request.

        Raises:
            NoWorker: See `Selector.select`.
        """
        costs = self._estimate(question, self._decoders(question))
        if self._is_aggregated(question):
            return self._aggregated(question, costs, "aggregated")
        decode_costs = as_decoder(costs, self._costs.rates)
        decode = self._row(self._decode, decode_costs, question)
        prefillers = self._prefillers(question, int(costs.slots[decode]))
        if not len(prefillers.slots):
            if self._disaggregation == "always":
                raise NoWorker("no prefill worker is ready that fits the decode worker's KV layout")
            return self._aggregated(question, costs, "aggregated: no prefill worker is ready that fits")
        prefill_costs = self._estimate(question, prefillers)
        prefill = self._policy(self._prefill, question).choose(prefill_costs, self._rng)
        if self._disaggregation == "auto" and not self._is_prefiller(question.request.pinned_worker):
            alone = self._row(self._alone, costs, question)
            max_tokens = question.request.max_tokens
            ways = Ways((costs, alone), (prefill_costs, prefill), (decode_costs, decode), max_tokens)
            if not pays(self._costs.rates, ways, self._weights):
                return self._aggregated(question, costs, "aggregated: predicted to be faster", alone)
        return self._disaggregated((prefill_costs, prefill), (decode_costs, decode), costs)

    def _is_aggregated(self, question: Question) -> bool:
        nobody_prefills = not len(self._fleet.prefillers.slots) and self._disaggregation != "always"
        return self._disaggregation == "never" or not question.allow_prefill or nobody_prefills

    def _decoders(self, question: Question) -> Candidates:
        ready, pin = self._fleet.decoders, question.request.pinned_worker
        if not len(ready.slots):
            raise NoWorker("no decode worker is ready")
        conditions = conditions_of(question.request, self._table)
        if pin and not self._is_prefiller(pin):
            conditions.append(lambda record: is_pinned(record, pin))
        if not conditions and not question.avoid:
            return ready
        allowed = narrow(self._table, ready, conditions, question.avoid)
        if not len(allowed.slots):
            raise NoWorker(f"none of {len(ready.slots)} ready workers has {_demands(question.request)}")
        return allowed

    def _prefillers(self, question: Question, decode_slot: int) -> Candidates:
        ready, pin = self._fleet.prefillers, question.request.pinned_worker
        if not len(ready.slots):
            return ready
        layout = self._table.record(decode_slot).layout
        conditions = [*conditions_of(question.request, self._table), lambda record: record.layout.is_compatible(layout)]
        if pin and self._is_prefiller(pin):
            conditions.append(lambda record: is_pinned(record, pin))
        return narrow(self._table, ready, conditions, question.avoid)

    def _is_prefiller(self, pin: str) -> bool:
        return any(is_pinned(self._table.record(slot), pin) for slot in self._fleet.prefillers.slots.tolist())

    def _estimate(self, question: Question, candidates: Candidates) -> Costs:
        costs = self._costs.estimate(question.request, candidates, question.matches, question.now_s)
        if question.request.preferred_tags:
            discount = self._config.preferred_tag_discount
            costs.factor = tag_factors(self._table, candidates, question.request, discount)
        return costs

    def _row(self, policy: CostPolicy, costs: Costs, question: Question) -> int:
        if question.session is not None and self._config.session_affinity != "off":
            slot = self._table.slot(question.session)
            rows = np.flatnonzero(costs.slots == slot) if slot is not None else _NO_ROWS
            if len(rows) and (self._config.session_affinity == "stick" or _is_near_best(costs, int(rows[0]))):
                return int(rows[0])
        return self._policy(policy, question).choose(costs, self._rng)

    def _policy(self, policy: CostPolicy, question: Question) -> CostPolicy:
        return self._when_stale if question.is_stale and self._counts_load else policy

    def _aggregated(self, question: Question, costs: Costs, reason: str, row: int | None = None) -> Way:
        row = self._row(self._alone, costs, question) if row is None else row
        return Way(
            decode_slot=int(costs.slots[row]),
            prefill_slot=None,
            choices=(self._choice(Role.AGGREGATED, costs, row),),
            reason=reason,
            work=_work(costs, row),
            work_s=float(costs.compute_s[row]),
            waits=_waits(costs, row),
            transfer_blocks=0.0,
            overlap_blocks=float(costs.overlap[row]),
            onboarded_blocks=costs.onboarded(row),
            ttft_s=float(costs.ttft_s[row]),
            itl_s=float(costs.itl_s[row]),
        )

    def _disaggregated(self, prefill: tuple[Costs, int], decode: tuple[Costs, int], whole: Costs) -> Way:
        (costs, row), (decode_costs, decode_row) = prefill, decode
        return Way(
            decode_slot=int(decode_costs.slots[decode_row]),
            prefill_slot=int(costs.slots[row]),
            choices=(
                self._choice(Role.PREFILL, costs, row),
                self._choice(Role.DECODE, decode_costs, decode_row),
            ),
            reason="disaggregated",
            work=_work(costs, row),
            work_s=float(costs.compute_s[row]),
            waits=_waits(costs, row),
            transfer_blocks=missing_blocks(whole, decode_row),
            overlap_blocks=float(costs.overlap[row]),
            onboarded_blocks=costs.onboarded(row),
            ttft_s=float(costs.ttft_s[row]),
            itl_s=float(decode_costs.itl_s[decode_row]),
        )

    def _choice(self, role: Role, costs: Costs, row: int) -> Choice:
        return Choice(role, costs, row, self._fleet.worker_ids)


def _work(costs: Costs, row: int) -> Work:
    uncached = float(costs.uncached[row])
    pairs = uncached * (costs.num_prompt_tokens - 0.5 * uncached)
    return Work(float(costs.steps[row]), uncached, pairs)


def _waits(costs: Costs, row: int) -> Waits:
    own_s = float(costs.ttft_s[row] - costs.queue_s[row])
    return Waits(own_s, float(costs.in_order_s[row]), float(costs.shared_s[row]))


def _is_near_best(costs: Costs, row: int) -> bool:
    if costs.is_measured:
        return float(costs.ttft_s[row]) <= _SESSION_SLACK * float(costs.ttft_s.min()) + _SESSION_SLACK_S
    return float(costs.active[row]) <= _SESSION_SLACK * float(costs.active.min()) + 1.0


def _demands(request: RoutingRequest) -> str:
    demands = [f"{name}={value}" for name, value in sorted(request.required_tags.items())]
    if request.pinned_worker:
        demands.append(f"the pinned name {request.pinned_worker!r}")
    if request.model_id:
        demands.append(f"the model {request.model_id[:12]}")
    return " and ".join(demands)
