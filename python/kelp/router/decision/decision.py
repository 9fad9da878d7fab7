"""What the selector decided about one request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kelp.registry.base import WorkerRecord
from kelp.router.decision.choosing import Way
from kelp.router.decision.request import RoutingRequest


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request shall run; `prefill` None: the decode worker computes the prompt (aggregated).

    Attributes:
        way: What was expected of it, with the figures of all candidates; None in decisions that no `select` of this
            process made, and in those that are `settled`.
        ttft_s: Predicted time to first token; 0 where nothing was.
        known_blocks: Leading prompt blocks that the worker which computes the prompt has in any tier; None where the
            index may not know all of them.
    """

    request: RoutingRequest
    decode: WorkerRecord
    prefill: WorkerRecord | None
    way: Way | None = field(default=None, repr=False, compare=False)
    ttft_s: float = 0.0
    known_blocks: int | None = None

    def settled(self) -> Decision:
        """The same for as long as the request lives, without what only choosing and reserving need."""
        return Decision(self.request, self.decode, self.prefill, None, self.ttft_s, self.known_blocks)

    def reservable(self) -> Decision:
        """The same for as long as it may be reserved, without the figures of all candidates."""
        return self if self.way is None else replace(self, way=replace(self.way, choices=()))

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """All workers involved, prefill first."""
        return (*((self.prefill.worker_id,) if self.prefill else ()), self.decode.worker_id)
