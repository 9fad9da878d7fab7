"""Requests of callers that may forget to tell how they ended: each counts until its time without a sign is over."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.router.decision.selector import Decision, Ended, FirstToken
from kelp.router.ledger import Ledger

_MAX_SELECTED = 4096
_MAX_SELECTED_BLOCKS = 1 << 20
_SELECTED_TTL_S = 120.0
_GONE = Ended(is_completed=False)


@dataclass(slots=True)
class _Held:
    decision: Decision
    reserved_s: float
    last_s: float


class Reservations:
    """Decisions by request id, in the order of their last signs of life: selected, reserved, sent.

    Args:
        ledger: Is told of every step.
        clock: Times them.
        reservation_ttl_s: How long a reservation lasts that is not committed.
        lease_ttl_s: How long a committed request lasts without a sign of life.
    """

    def __init__(self, ledger: Ledger, clock: Clock, reservation_ttl_s: float, lease_ttl_s: float) -> None:
        self._ledger = ledger
        self._clock = clock
        self._ttls_s = (_SELECTED_TTL_S, reservation_ttl_s, lease_ttl_s)
        self._selected: OrderedDict[str, _Held] = OrderedDict()
        self._num_selected_blocks = 0
        self._reserved: OrderedDict[str, _Held] = OrderedDict()
        self._sent: OrderedDict[str, _Held] = OrderedDict()

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests that count as active."""
        return (*self._reserved, *self._sent)

    def select(self, decision: Decision) -> None:
        """Remember a decision that somebody may want to reserve; the oldest of too many, or too long ones, go."""
        self._forget_selected(decision.request.request_id)
        self._put(self._selected, decision.reservable())
        self._num_selected_blocks += len(decision.request.block_hashes)
        while len(self._selected) > _MAX_SELECTED or self._num_selected_blocks > _MAX_SELECTED_BLOCKS:
            self._forget_selected(next(iter(self._selected)))

    def reserve_selected(self, request_id: str) -> bool:
        """Count a selected request as active; False if it is not known (any more)."""
        held = self._forget_selected(request_id)
        if held is None:
            return False
        self.reserve(held.decision)
        return True

    def reserve(self, decision: Decision) -> None:
        """Count a request as active, the one of that name that was there before no longer."""
        self.free(decision.request.request_id, _GONE)
        self._ledger.reserve(decision)
        # Its sender may take a while.
        self._ledger.announce(decision)
        self._put(self._reserved, decision.settled())

    def commit(self, request_id: str) -> bool:
        """It has been sent; False if it is not known (any more)."""
        held = self._reserved.pop(request_id, None)
        if held is None:
            return request_id in self._sent
        self._ledger.commit(held.decision)
        self._sent[request_id] = held
        self._renew(request_id)
        return True

    def first_token(self, request_id: str, told: FirstToken) -> bool:
        """Its prompt has been computed; whoever says so has sent it."""
        self.commit(request_id)
        held = self._renew(request_id)
        if held is not None:
            self._ledger.first_token(held.decision, told, held.last_s - held.reserved_s)
        return held is not None

    def progress(self, request_id: str, num_tokens: int) -> bool:
        """So many more tokens came."""
        held = self._renew(request_id)
        if held is not None:
            self._ledger.progress(held.decision, num_tokens)
        return held is not None

    def free(self, request_id: str, ended: Ended) -> bool:
        """Nothing of it runs any more."""
        self._forget_selected(request_id)
        held = self._reserved.pop(request_id, None) or self._sent.pop(request_id, None)
        if held is not None:
            self._ledger.free(held.decision, ended)
        return held is not None

    def sweep(self) -> None:
        """Forget what has been silent for too long, and free what it had: to be called now and then."""
        now_s = self._clock.monotonic_s()
        for held_by_id, ttl_s in zip((self._selected, self._reserved, self._sent), self._ttls_s, strict=True):
            while held_by_id and next(iter(held_by_id.values())).last_s + ttl_s <= now_s:
                request_id = next(iter(held_by_id))
                if held_by_id is self._selected:
                    self._forget_selected(request_id)
                else:
                    self.free(request_id, _GONE)

    def _forget_selected(self, request_id: str) -> _Held | None:
        held = self._selected.pop(request_id, None)
        if held is not None:
            self._num_selected_blocks -= len(held.decision.request.block_hashes)
        return held

    def _put(self, held_by_id: OrderedDict[str, _Held], decision: Decision) -> None:
        now_s = self._clock.monotonic_s()
        held_by_id.pop(decision.request.request_id, None)
        held_by_id[decision.request.request_id] = _Held(decision, now_s, now_s)

    def _renew(self, request_id: str) -> _Held | None:
        held = self._sent.get(request_id)
        if held is not None:
            held.last_s = self._clock.monotonic_s()
            self._sent.move_to_end(request_id)
        return held
