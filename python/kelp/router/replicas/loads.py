"""What several routers of the same workers know of each other's requests.

Each numbers its messages; whoever misses one asks for a snapshot, which says up to which message it holds. Entries are
leases: their router renews them while the request lives, and its own record in the registry stands for it. Sans-I/O:
`replica_link` carries the messages over ZMQ, property tests over a network that loses, doubles and reorders them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from kelp.router.replicas.messages import (
    MAX_ENTRIES,
    ActiveLoad,
    Add,
    Delta,
    Deltas,
    Free,
    PrefillDone,
    Renew,
    Snapshot,
)

_MAX_EARLY = 256


class LoadSink(Protocol):
    """Takes other routers' loads into account (`router.decision.selector`); ids are unique over routers."""

    def peer_added(self, peer_id: str, load: ActiveLoad) -> None:
        """Another router's request runs."""

    def peer_prefilled(self, peer_id: str) -> None:
        """Its prompt has been computed."""

    def peer_renewed(self, peer_id: str) -> None:
        """It still runs."""

    def peer_freed(self, peer_id: str) -> None:
        """It has ended, or nobody vouches for it any more."""


class OwnLoads:
    """This router's requests, and the messages about them; belongs to one event loop.

    Attributes:
        router_id: This router's name.
        epoch: When it started, wall-clock nanoseconds.
    """

    def __init__(self, router_id: str, epoch: int) -> None:
        self.router_id = router_id
        self.epoch = epoch
        self._seq = 0
        self._loads: dict[str, ActiveLoad] = {}
        self._pending: list[Delta] = []

    @property
    def has_news(self) -> bool:
        """Whether something waits to be told."""
        return bool(self._pending)

    def add(self, load: ActiveLoad) -> None:
        """A request has been placed."""
        self._loads[load.request_id] = load
        self._pending.append(Add(load))

    def prefilled(self, request_id: str) -> None:
        """Its first token came; unknown ids are ignored, here and in `free`."""
        load = self._loads.get(request_id)
        if load is not None and not load.is_prefilled:
            self._loads[request_id] = msgspec.structs.replace(load, is_prefilled=True)
            self._pending.append(PrefillDone(request_id))

    def free(self, request_id: str) -> None:
        """Nothing of it runs any more."""
        if self._loads.pop(request_id, None) is not None:
            self._pending.append(Free(request_id))

    def renew(self) -> None:
        """Vouch for everything that runs."""
        names = tuple(self._loads)
        for start in range(0, len(names), MAX_ENTRIES):
            self._pending.append(Renew(names[start : start + MAX_ENTRIES]))

    def message(self) -> Deltas:
        """The next message: all news that one can hold, or a heartbeat."""
        self._seq += 1
        deltas, self._pending = tuple(self._pending[:MAX_ENTRIES]), self._pending[MAX_ENTRIES:]
        return Deltas(self.router_id, self.epoch, self._seq, deltas)

    def snapshot(self) -> Snapshot:
        """All that runs. News not told yet may be in it already: telling them again changes nothing."""
        return Snapshot(self.router_id, self.epoch, self._seq, tuple(self._loads.values()))


@dataclass(slots=True)
class _Entry:
    load: ActiveLoad
    renewed_s: float


@dataclass(slots=True)
class _Peer:
    """One other router.

    Attributes:
        next_seq: None until a snapshot, or its very first message, gave a place to start from.
        is_incomplete: It vouched for a request that is not known here (any more).
    """

    epoch: int
    heard_s: float
    next_seq: int | None = None
    entries: dict[str, _Entry] = field(default_factory=dict)
    early: dict[int, Deltas] = field(default_factory=dict)
    is_incomplete: bool = False

    @property
    def is_behind(self) -> bool:
        """Whether messages are missing."""
        return self.next_seq is None or self.is_incomplete or bool(self.early)


class PeerLoads:
    """What is known of the other routers' requests; belongs to one event loop.

    Args:
        sink: Told of every change.
        lease_s: An entry lives this long without being renewed.
        stale_s: What is known of a router that has been silent, or behind, for this long is not trusted.
    """

    def __init__(self, sink: LoadSink, lease_s: float, stale_s: float) -> None:
        self._sink = sink
        self._lease_s = lease_s
        self._stale_s = stale_s
        self._peers: dict[str, _Peer] = {}

    def set_peers(self, epochs: Mapping[str, int], now_s: float) -> None:
        """Take the registry's latest: whoever is not in it is gone with everything it had."""
        for router_id in [router_id for router_id in self._peers if router_id not in epochs]:
            self._forget(router_id, self._peers.pop(router_id))
        for router_id, epoch in epochs.items():
            self._incarnation(router_id, epoch, now_s)

    def receive(self, message: Deltas, now_s: float) -> None:
        """Take a message: once, in order, and only of routers that `set_peers` named."""
        if message.router_id not in self._peers:
            return
        peer = self._incarnation(message.router_id, message.epoch, now_s)
        if message.epoch < peer.epoch or (peer.next_seq is not None and message.seq < peer.next_seq):
            return
        if peer.next_seq is None and message.seq == 1:
            peer.next_seq = 1
        peer.early[message.seq] = message
        self._catch_up(message.router_id, peer, now_s)
        if len(peer.early) > _MAX_EARLY:
            peer.early.clear()
            peer.next_seq = None

    def restore(self, snapshot: Snapshot, now_s: float) -> None:
        """Take a snapshot, unless it is older than what is known."""
        if snapshot.router_id not in self._peers:
            return
        peer = self._incarnation(snapshot.router_id, snapshot.epoch, now_s)
        if snapshot.epoch < peer.epoch or (peer.next_seq is not None and snapshot.seq + 1 < peer.next_seq):
            return
        loads = {load.request_id: load for load in snapshot.loads}
        for request_id in [request_id for request_id in peer.entries if request_id not in loads]:
            self._drop(snapshot.router_id, peer, request_id)
        for load in loads.values():
            self._put(snapshot.router_id, peer, load, now_s)
        peer.next_seq, peer.is_incomplete = snapshot.seq + 1, False
        peer.early = {seq: message for seq, message in peer.early.items() if seq > snapshot.seq}
        self._catch_up(snapshot.router_id, peer, now_s)

    def behind(self) -> list[str]:
        """Routers whose snapshot is needed."""
        return [router_id for router_id, peer in self._peers.items() if peer.is_behind]

    def lapse(self, now_s: float) -> None:
        """Drop what nobody has renewed."""
        for router_id, peer in self._peers.items():
            for request_id in [key for key, entry in peer.entries.items() if now_s - entry.renewed_s > self._lease_s]:
                self._drop(router_id, peer, request_id)

    @property
    def num_peers(self) -> int:
        """Other routers."""
        return len(self._peers)

    def num_stale(self, now_s: float) -> int:
        """Routers of whose requests too little is known to count on it."""
        return sum(now_s - peer.heard_s > self._stale_s for peer in self._peers.values())

    def loads(self, router_id: str) -> dict[str, ActiveLoad]:
        """A router's requests by id."""
        peer = self._peers.get(router_id)
        return {} if peer is None else {request_id: entry.load for request_id, entry in peer.entries.items()}

    def _incarnation(self, router_id: str, epoch: int, now_s: float) -> _Peer:
        peer = self._peers.get(router_id)
        if peer is not None and peer.epoch >= epoch:
            return peer
        if peer is not None:
            self._forget(router_id, peer)
        self._peers[router_id] = _Peer(epoch, now_s)
        return self._peers[router_id]

    def _catch_up(self, router_id: str, peer: _Peer, now_s: float) -> None:
        while peer.next_seq is not None and (message := peer.early.pop(peer.next_seq, None)) is not None:
            for delta in message.deltas:
                self._apply(router_id, peer, delta, now_s)
            peer.next_seq += 1
        if not peer.is_behind:
            peer.heard_s = now_s

    def _apply(self, router_id: str, peer: _Peer, delta: Delta, now_s: float) -> None:
        if isinstance(delta, Add):
            self._put(router_id, peer, delta.load, now_s)
        elif isinstance(delta, Free):
            self._drop(router_id, peer, delta.request_id)
        elif isinstance(delta, PrefillDone):
            entry = peer.entries.get(delta.request_id)
            if entry is not None:
                self._put(router_id, peer, msgspec.structs.replace(entry.load, is_prefilled=True), now_s)
        else:
            for request_id in delta.request_ids:
                if (entry := peer.entries.get(request_id)) is not None:
                    entry.renewed_s = now_s
                    self._sink.peer_renewed(_peer_id(router_id, request_id))
                else:
                    peer.is_incomplete = True

    def _put(self, router_id: str, peer: _Peer, load: ActiveLoad, now_s: float) -> None:
        old = peer.entries.get(load.request_id)
        if old is not None and old.load.is_prefilled:
            load = old.load
        peer.entries[load.request_id] = _Entry(load, now_s)
        peer_id = _peer_id(router_id, load.request_id)
        if old is None:
            self._sink.peer_added(peer_id, load)
        elif load.is_prefilled and not old.load.is_prefilled:
            self._sink.peer_prefilled(peer_id)

    def _drop(self, router_id: str, peer: _Peer, request_id: str) -> None:
        if peer.entries.pop(request_id, None) is not None:
            self._sink.peer_freed(_peer_id(router_id, request_id))

    def _forget(self, router_id: str, peer: _Peer) -> None:
        for request_id in list(peer.entries):
            self._drop(router_id, peer, request_id)


def _peer_id(router_id: str, request_id: str) -> str:
    # No client's own id begins like that.
    return f"\0{router_id}|{request_id}"
