"""Other routers' requests in this router's counts; implements `replicas.LoadSink`."""

from __future__ import annotations

from dataclasses import dataclass

from kelp.core.clock import Clock
from kelp.core.types import WorkerKey
from kelp.router.decision.load import Entry, Load
from kelp.router.decision.workers import WorkerTable
from kelp.router.replicas.messages import ActiveLoad
from kelp.timing.rates import Rates, Work


@dataclass(slots=True)
class _PeerRequest:
    """`computing` is where the prompt is computed, `decoding` where tokens are generated; None on unknown workers."""

    load: ActiveLoad
    is_prefilled: bool
    computing: Entry | None
    decoding: Entry | None


class PeerLoad:
    """Belongs to one event loop.

    A request on a worker that this router has not met yet is counted as soon as it has; one on a worker that has left
    is kept by `Load`.
    """

    def __init__(self, table: WorkerTable, load: Load, rates: Rates, clock: Clock) -> None:
        self._table = table
        self._load = load
        self._rates = rates
        self._clock = clock
        self._requests: dict[str, _PeerRequest] = {}
        table.watch(self._joined, lambda _: None)

    def __len__(self) -> int:
        return len(self._requests)

    def peer_added(self, peer_id: str, load: ActiveLoad) -> None:
        """See `LoadSink`."""
        request = _PeerRequest(load, load.is_prefilled, None, None)
        self._requests[peer_id] = request
        self._count(peer_id, request)

    def peer_prefilled(self, peer_id: str) -> None:
        """See `LoadSink`."""
        request, now_s = self._requests[peer_id], self._clock.monotonic_s()
        request.is_prefilled = True
        if request.computing is not None:
            self._load.prefilled(request.computing, now_s)
            if request.computing is not request.decoding:
                self._load.remove(request.computing, now_s)
        if request.decoding is not None:
            self._load.decoding(request.decoding, now_s)

    def peer_renewed(self, peer_id: str) -> None:
        """See `LoadSink`."""
        request, now_s = self._requests[peer_id], self._clock.monotonic_s()
        for entry in (request.computing, request.decoding):
            if entry is not None:
                entry.now_s = now_s

    def peer_freed(self, peer_id: str) -> None:
        """See `LoadSink`."""
        request, now_s = self._requests.pop(peer_id), self._clock.monotonic_s()
        for entry in (request.computing, request.decoding):
            if entry is not None:
                self._load.remove(entry, now_s)

    def _joined(self, slot: int) -> None:
        key = self._table.record(slot).key
        for peer_id, request in self._requests.items():
            if key in (request.load.decode, request.load.prefill):
                self._count(peer_id, request)

    def _count(self, peer_id: str, request: _PeerRequest) -> None:
        load = request.load
        work = None if request.is_prefilled else Work(*load.work)
        if request.decoding is None:
            own_work = work if load.prefill is None else None
            request.decoding = self._enter(peer_id, load.decode, load, own_work)
            if request.decoding is not None and request.is_prefilled:
                self._load.decoding(request.decoding, request.decoding.now_s)
        if load.prefill is None:
            request.computing = request.decoding
        elif request.computing is None and work is not None:
            request.computing = self._enter(peer_id, load.prefill, load, work)

    def _enter(self, peer_id: str, key: WorkerKey, load: ActiveLoad, work: Work | None) -> Entry | None:
        slot = self._table.slot(key)
        if slot is None:
            return None
        work_s = 0.0 if work is None else self._rates.seconds(slot, work)
        entry = Entry(peer_id, slot, load.kv_tokens, work, work_s, self._clock.monotonic_s(), is_committed=True)
        self._load.add(entry)
        return entry
