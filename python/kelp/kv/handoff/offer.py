"""One prefilled (or still prefilling) prompt that waits for its reader, and the board where readers find it.

Everything here belongs to the event loop thread. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Sequence

from kelp.core.clock import Clock
from kelp.core.errors import FatalTransferError, KelpError, NotFound, ProtocolError
from kelp.core.handoff_messages import Announce, HandoffEvent, HandoffFailed, PrefillDone
from kelp.core.types import BlockId
from kelp.kv.handoff.lease import Lease

_MAX_ENDED = 1024
_MAX_ERROR_CHARS = 4000


def failed_event(error: KelpError) -> HandoffFailed:
    """What a reader is told about `error`."""
    return HandoffFailed(message=str(error)[:_MAX_ERROR_CHARS])


class Offer:
    """What the worker says about one prompt. After the lease has ended, everything said is ignored.

    Attributes:
        handoff_id: Random name made by the router.
        lease: Holds the blocks.
        events: What the reader is told, in order; grows until the offer ends.
        has_news: Set whenever `events` grew.
    """

    def __init__(self, handoff_id: str, lease: Lease, on_end: Callable[[str, KelpError], None]) -> None:
        self.handoff_id = handoff_id
        self.lease = lease
        self.events: list[HandoffEvent] = []
        self.has_news = asyncio.Event()
        self._on_end = on_end
        self._is_claimed = False
        self._is_finished = False

    @property
    def is_live(self) -> bool:
        """Whether the blocks are still held."""
        return self.lease.is_live

    def announce(self, num_tokens: int, block_ids: Sequence[BlockId]) -> None:
        """KV of the first `num_tokens` prompt tokens is final; `block_ids` are those not yet announced."""
        assert not self._is_finished, "nothing is announced after finish"
        self._tell(Announce(num_tokens=num_tokens, block_ids=tuple(block_ids)))

    def finish(self, first_token: int, first_log_prob: float) -> None:
        """All KV is announced; from now on the lease expires without a reader."""
        assert not self._is_finished, "a prefill finishes once"
        self._is_finished = True
        self._tell(PrefillDone(first_token=first_token, first_log_prob=first_log_prob))
        if not self.lease.renew():
            self.end_expired()

    def fail(self, error: KelpError) -> None:
        """Nobody needs the KV any more: tell the reader and release at once.

        Releasing is safe although a READ may be running: without `finish` no reader uses what it has read. For
        the same reason this is ignored once a reader has attached and may have heard of `finish`.
        """
        if not (self._is_finished and self._is_claimed):
            self.end(error)

    def claim(self) -> None:
        """Bind the offer to one reader and start its lease.

        Raises:
            ProtocolError: Another reader has or had it.
            FatalTransferError: The lease has expired.
        """
        if self._is_claimed:
            raise ProtocolError(f"handoff {self.handoff_id}: attached already")
        self._is_claimed = True
        if not self.renew():
            raise FatalTransferError(f"handoff {self.handoff_id}: the lease has expired")

    def renew(self) -> bool:
        """A sign of life of the reader; False if it came too late."""
        if self.lease.renew():
            return True
        self.end_expired()
        return False

    def expire(self) -> None:
        """End the offer if its lease has run out."""
        if self.lease.expire():
            self.end_expired()

    def end_expired(self) -> None:
        """End the offer because its lease has run out."""
        self.end(FatalTransferError(f"handoff {self.handoff_id}: the lease of {self.lease.ttl_s} s has expired"))

    def end(self, error: KelpError) -> None:
        """Release the blocks and let `error` be what a reader hears from now on; idempotent."""
        self._tell(failed_event(error))
        self._on_end(self.handoff_id, error)
        self.lease.release()

    def _tell(self, event: HandoffEvent) -> None:
        if self.events and isinstance(self.events[-1], HandoffFailed):
            return
        self.events.append(event)
        self.has_news.set()


class OfferBoard:
    """All live offers, the readers that came before their offer, and why recent offers ended."""

    def __init__(self, ttl_s: float, clock: Clock) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._live: dict[str, Offer] = {}
        self._awaited: dict[str, asyncio.Future[Offer]] = {}
        self._ended: collections.OrderedDict[str, KelpError] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def add(self, handoff_id: str, on_release: Callable[[], None]) -> Offer:
        """Hold blocks for the reader that knows `handoff_id`.

        Raises:
            ProtocolError: The id is in use.
        """
        if handoff_id in self._live:
            raise ProtocolError(f"handoff_id {handoff_id!r} is in use")
        offer = Offer(handoff_id, Lease(self._ttl_s, self._clock, on_release), self._retire)
        self._live[handoff_id] = offer
        self._ended.pop(handoff_id, None)
        waiting = self._awaited.pop(handoff_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(offer)
        return offer

    async def find(self, handoff_id: str, timeout_s: float) -> Offer:
        """The offer, which may be about to be made.

        Raises:
            NotFound: None appeared within `timeout_s`.
            ProtocolError: Another reader waits for it.
            KelpError: It has ended; the reason.
        """
        if handoff_id in self._live:
            return self._live[handoff_id]
        if handoff_id in self._ended:
            raise self._ended[handoff_id]
        if handoff_id in self._awaited:
            raise ProtocolError(f"handoff {handoff_id}: attached already")
        appeared = self._awaited[handoff_id] = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(appeared, timeout_s)
        except asyncio.TimeoutError:
            raise NotFound(f"handoff {handoff_id} was not offered within {timeout_s} s") from None
        finally:
            if self._awaited.get(handoff_id) is appeared:
                del self._awaited[handoff_id]

    def sweep(self) -> None:
        """End the offers whose leases have run out."""
        for offer in list(self._live.values()):
            offer.expire()

    def end_all(self, error: KelpError) -> None:
        """Release everything."""
        for offer in list(self._live.values()):
            offer.end(error)

    def _retire(self, handoff_id: str, error: KelpError) -> None:
        if self._live.pop(handoff_id, None) is None:
            return
        self._ended[handoff_id] = error
        if len(self._ended) > _MAX_ENDED:
            self._ended.popitem(last=False)
