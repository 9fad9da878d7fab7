"""What a worker reports about a request besides its tokens: counts and stamps, taken as the request goes on."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.core.messages import RequestTimings, RequestUsage
from kelp.core.types import FinishReason
from kelp.executor.base import Completed


@dataclass(slots=True)
class Progress:
    """Counts for `RequestUsage`, stamps for `RequestTimings`."""

    arrival_ns: int
    first_scheduled_ns: int = 0
    prefill_done_ns: int = 0
    transfer_start_ns: int = 0
    transfer_done_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    cached_tokens: int = 0
    new_blocks: int = 0
    reused_blocks: int = 0
    transferred_blocks: int = 0
    onboarded_blocks: int = 0

    @property
    def usage(self) -> RequestUsage:
        """The counts so far."""
        return RequestUsage(
            cached_tokens=self.cached_tokens,
            new_blocks=self.new_blocks,
            reused_blocks=self.reused_blocks,
            transferred_blocks=self.transferred_blocks,
            onboarded_blocks=self.onboarded_blocks,
        )

    def completed(self, reason: FinishReason | None) -> Completed:
        """The event that ends the request."""
        timings = RequestTimings(
            arrival_ns=self.arrival_ns,
            first_scheduled_ns=self.first_scheduled_ns,
            prefill_done_ns=self.prefill_done_ns,
            transfer_start_ns=self.transfer_start_ns,
            transfer_done_ns=self.transfer_done_ns,
            first_token_ns=self.first_token_ns,
            last_token_ns=self.last_token_ns,
        )
        return Completed(reason, self.usage, timings)
