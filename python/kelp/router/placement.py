"""Where a request runs: one decode worker, and where it pays a prefill worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from kelp.core.errors import CapacityError
from kelp.core.types import Role, WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.policies import Candidate, Policy, RoutingRequest


class WorkersView(Protocol):
    """What the router needs of `registry.view`."""

    def ready(self) -> list[WorkerRecord]:
        """Workers that may get new requests."""

    def is_alive(self, worker_id: str, epoch: str) -> bool:
        """Whether this incarnation still renews its record."""

    async def refresh(self) -> None:
        """Look again, now."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` None: the decode worker does everything (aggregated)."""

    decode: WorkerRecord
    prefill: WorkerRecord | None

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """All workers involved, prefill first."""
        return (*((self.prefill.worker_id,) if self.prefill else ()), self.decode.worker_id)


def key_of(record: WorkerRecord) -> WorkerKey:
    """See `WorkerKey`."""
    return record.key


class Placer:
    """Chooses placements and counts what is in flight; belongs to one event loop."""

    def __init__(self, view: WorkersView, make_policy: Callable[[], Policy], disaggregation: str) -> None:
        self._view = view
        self._prefill_policy = make_policy()
        self._decode_policy = make_policy()
        self._disaggregation = disaggregation
        self._in_flight: Counter[WorkerKey] = Counter()

    def place(
        self, request: RoutingRequest, avoid: frozenset[WorkerKey] = frozenset(), allow_prefill: bool = True
    ) -> Placement:
        """Choose workers.

        Args:
            request: What to place.
            avoid: Workers that have just failed this request; used again only if nothing else is left.
            allow_prefill: False once remote prefill has failed too often for this request.

        Raises:
            CapacityError: No worker of a needed role is ready.
        """
        ready = self._view.ready()
        decodes = [record for record in ready if record.role is not Role.PREFILL]
        if not decodes:
            raise CapacityError("no decode worker is ready")
        decode = self._choose(self._decode_policy, decodes, request, avoid)
        if self._disaggregation == "never" or not allow_prefill:
            return Placement(decode, None)
        prefills = [
            record for record in ready if record.role is Role.PREFILL and record.layout.is_compatible(decode.layout)
        ]
        if not prefills:
            if self._disaggregation == "always":
                raise CapacityError("no prefill worker is ready that fits the decode worker's KV layout")
            return Placement(decode, None)
        return Placement(decode, self._choose(self._prefill_policy, prefills, request, avoid))

    async def look_again(self) -> None:
        """For a request that found no worker: one may have come since."""
        await self._view.refresh()

    @contextmanager
    def counting(self, placement: Placement) -> Iterator[None]:
        """Count a placement as in flight while the block runs."""
        keys = [key_of(record) for record in (placement.decode, placement.prefill) if record is not None]
        self._in_flight.update(keys)
        try:
            yield
        finally:
            self._in_flight.subtract(keys)
            self._in_flight += Counter()

    def _choose(
        self,
        policy: Policy,
        records: Sequence[WorkerRecord],
        request: RoutingRequest,
        avoid: frozenset[WorkerKey],
    ) -> WorkerRecord:
        preferred = [record for record in records if key_of(record) not in avoid] or records
        candidates = [Candidate(record, self._in_flight[key_of(record)]) for record in preferred]
        return policy.choose(candidates, request).record
