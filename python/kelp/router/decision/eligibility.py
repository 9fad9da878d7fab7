"""Which workers may serve a request at all, before anybody counts costs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kelp.core.types import WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.decision.fleet import Candidates
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.workers import WorkerTable

Condition = Callable[[WorkerRecord], bool]


def is_pinned(record: WorkerRecord, pin: str) -> bool:
    """Whether a pin means this worker."""
    return pin in (record.worker_id, record.model_name)


def narrow(
    table: WorkerTable, candidates: Candidates, conditions: list[Condition], avoid: frozenset[WorkerKey]
) -> Candidates:
    """Candidates that meet all conditions, possibly none; workers to avoid only if nobody else does."""
    slots = candidates.slots.tolist()
    for meets in conditions:
        slots = [slot for slot in slots if meets(table.record(slot))]
    if avoid:
        slots = [slot for slot in slots if table.record(slot).key not in avoid] or slots
    return Candidates.of(np.array(slots, np.intp), table.num_slots)


def conditions_of(request: RoutingRequest, table: WorkerTable) -> list[Condition]:
    """What the request demands of every worker that serves it, and not every worker meets."""
    required, model_id = request.required_tags.items(), request.model_id
    conditions: list[Condition] = []
    if model_id and model_id != table.only_model_id:
        conditions.append(lambda record: record.layout.model_id == model_id)
    if required:
        conditions.append(lambda record: required <= record.tags.items())
    return conditions


def tag_factors(
    table: WorkerTable, candidates: Candidates, request: RoutingRequest, discount: float
) -> npt.NDArray[np.float64] | float:
    """Factors of costs, `[n]`: each preferred tag that matches makes a worker cheaper by `discount`."""
    if not request.preferred_tags:
        return 1.0
    preferred = request.preferred_tags.items()
    matching = [len(preferred & table.record(slot).tags.items()) for slot in candidates.slots.tolist()]
    factors: npt.NDArray[np.float64] = (1.0 - discount) ** np.array(matching, np.float64)
    return factors
