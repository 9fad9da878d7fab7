"""Whether a worker is full: more requests would only wait there, where nobody can order or move them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kelp.core.config_replicas import QueueConfig
from kelp.core.types import WorkerKey
from kelp.router.decision.eligibility import conditions_of, is_pinned
from kelp.router.decision.fleet import Fleet
from kelp.router.decision.load import Load
from kelp.router.decision.request import RoutingRequest
from kelp.router.decision.workers import WorkerTable


class Fullness(NamedTuple):
    """Who is full at one moment; `is_everywhere`: every worker that decodes."""

    workers: frozenset[WorkerKey]
    is_everywhere: bool


_NOBODY = Fullness(frozenset(), False)


class Capacity:
    """Reads the selector's counts; changes nothing.

    A worker without any request is never full, whatever a single request would need.
    """

    def __init__(self, table: WorkerTable, fleet: Fleet, load: Load, config: QueueConfig) -> None:
        self._table = table
        self._fleet = fleet
        self._load = load
        self._config = config

    def is_full(self, key: WorkerKey) -> bool:
        """Whether one worker is full now."""
        slot = self._table.slot(key) if self._config.max_waiting else None
        return slot is not None and bool(self._is_full(slot))

    def is_idle(self, key: WorkerKey) -> bool:
        """Whether a worker has no request at all, as far as anybody knows."""
        slot = self._table.slot(key)
        return slot is not None and not self._load.active[slot] + self._load.foreign[slot]

    def full(self) -> Fullness:
        """Workers that are full now."""
        is_full = self._is_full(slice(None)) if self._config.max_waiting else None
        if is_full is None or not is_full.any():
            return _NOBODY
        keys = frozenset(self._table.record(slot).key for slot in np.flatnonzero(is_full).tolist())
        is_decoder_full = is_full[self._fleet.decoders.slots]
        return Fullness(keys, bool(len(is_decoder_full) and is_decoder_full.all()))

    def has_room(self, request: RoutingRequest, full: Fullness) -> bool:
        """Whether a worker that could decode the request, as far as its wishes tell, is not full."""
        conditions = conditions_of(request, self._table)
        if full.is_everywhere or not (request.pinned_worker or conditions):
            return not full.is_everywhere
        records = [self._table.record(slot) for slot in self._fleet.decoders.slots.tolist()]
        if any(is_pinned(record, request.pinned_worker) for record in records):
            conditions.append(lambda record: is_pinned(record, request.pinned_worker))
        return any(record.key not in full.workers and all(meets(record) for meets in conditions) for record in records)

    def _is_full(self, at: slice | int) -> npt.NDArray[np.bool_]:
        config, load, fleet = self._config, self._load, self._fleet
        busy = load.active[at] + load.foreign[at]
        pool_tokens = fleet.num_blocks[at] * fleet.block_size[at]
        is_full: npt.NDArray[np.bool_] = (
            (busy >= config.running_factor * fleet.max_running[at])
            | (load.kv_tokens[at] >= config.kv_factor * pool_tokens)
            | (load.pending_s[at] >= config.prefill_window_s)
        )
        return is_full & (busy > 0)
