"""The decision, alone: which workers serve a request, and what is on its way to them.

Synchronous and free of I/O, so that the Triton router, `kelp router` and the simulator run this very code, on whatever
clock. Life of a request here:

    select ─► reserve ─► commit ─► first_token ─► progress* ─► free
                 └──────── free (never sent, failed, cancelled) ──┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kelp.core.types import WorkerKey
from kelp.registry.base import WorkerRecord
from kelp.router.request import RoutingRequest


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request shall run; `prefill` None: the decode worker computes the prompt (aggregated)."""

    request: RoutingRequest
    decode: WorkerRecord
    prefill: WorkerRecord | None

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """All workers involved, prefill first."""
        return (*((self.prefill.worker_id,) if self.prefill else ()), self.decode.worker_id)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What the workers told with a request's first token; seconds as they measured them, 0 where it did not happen.

    Attributes:
        num_cached_tokens: Prompt tokens that the worker that prefilled did not compute.
        queue_s: Arrival at that worker to its first step.
        prefill_s: First step to the first token.
        transfer_s: KV from the prefill to the decode worker.
    """

    num_cached_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended: whether it completed, its output tokens, and first token to last."""

    is_completed: bool
    num_output_tokens: int = 0
    decode_s: float = 0.0


class Selector:
    """Chooses, remembers what it chose, and learns from what came of it; belongs to one event loop."""

    def set_workers(self, records: Sequence[WorkerRecord]) -> None:
        """Take the registry's latest snapshot, workers that are not ready included."""
        raise NotImplementedError

    def select(
        self, request: RoutingRequest, avoid: frozenset[WorkerKey] = frozenset(), allow_prefill: bool = True
    ) -> Decision:
        """Choose; changes nothing but the record for `explain`.

        Args:
            request: What to place.
            avoid: Workers that have just failed this request; used again only if nothing else is left.
            allow_prefill: False once remote prefill has failed too often for this request.

        Raises:
            CapacityError: No worker of a needed role is ready, or none that the request's pin and tags allow.
        """
        raise NotImplementedError

    def reserve(self, decision: Decision) -> None:
        """Count the request as active there, and expect its blocks; lapses if `commit` does not follow in time."""
        raise NotImplementedError

    def commit(self, request_id: str) -> bool:
        """The request has been sent. False if its reservation has lapsed: select again."""
        raise NotImplementedError

    def first_token(self, request_id: str, told: FirstToken) -> None:
        """The prompt has been computed; learn from it. Unknown ids are ignored, as in the calls below."""
        raise NotImplementedError

    def progress(self, request_id: str, num_tokens: int) -> None:
        """That many more output tokens came: the request lives, and its KV grows."""
        raise NotImplementedError

    def free(self, request_id: str, ended: Ended) -> None:
        """Nothing of the request runs any more; idempotent."""
        raise NotImplementedError
