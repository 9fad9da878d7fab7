"""All requests to the object store pass here, one at a time: bounded in time, counted, and refused while it is down."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from kelp.core.errors import RetryableTransferError
from kelp.kv.tiers.objects.breaker import CircuitBreaker
from kelp.kv.tiers.objects.counters import ObjectCounters
from kelp.kv.tiers.objects.messages import AnyAnswer, AnyRequest
from kelp.kv.tiers.objects.process import StoreProcess, StoreTimeout

_log = logging.getLogger(__name__)


class StoreGate:
    """See the module docstring; thread-safe."""

    def __init__(self, process: StoreProcess, breaker: CircuitBreaker, timeout_s: float) -> None:
        self._process = process
        self._breaker = breaker
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self.counters = ObjectCounters()

    @property
    def is_available(self) -> bool:
        """Whether a request would be made now."""
        return self._process.is_ready and not self._breaker.is_open

    @property
    def state(self) -> str:
        """See `CircuitBreaker.state`."""
        return self._breaker.state

    def ask(self, request: AnyRequest, busy_slots: Iterable[int] = (), share: float = 1.0) -> AnyAnswer:
        """Make a request that may take this share of the timeout.

        Raises:
            RetryableTransferError: It was not made, or it failed.
        """
        with self._lock:
            if not self.is_available:
                self.counters.num_refused += 1
                state = self.state if self._process.is_ready else "starting"
                raise RetryableTransferError(f"object store: left alone ({state})")
            try:
                answer = self._process.ask(request, share * self._timeout_s, busy_slots)
            except RetryableTransferError as error:
                self._failed(error.text, isinstance(error, StoreTimeout))
                raise
            failure = getattr(answer, "failure", "")
            if failure:
                self._failed(failure, is_timeout=False)
            else:
                self._breaker.succeeded()
            return answer

    def _failed(self, reason: str, is_timeout: bool) -> None:
        self.counters.num_failures += 1
        self.counters.num_timeouts += is_timeout
        self._breaker.failed()
        _log.warning("object store: %s (%s)", reason.removeprefix("object store: "), self.state)
