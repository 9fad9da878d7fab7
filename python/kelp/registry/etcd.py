"""Records in an etcd, for several hosts: each stands under a lease that its writer's heartbeats keep alive.

Who is alive is etcd's to say, by its own clock: no two hosts' clocks are compared. An etcd that was away, or has come
back knowing less than it did, is not taken at its word for the time of one lease: whoever it misses is kept until he
has had time to register again. Knows nothing of what the records say.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Generic, Protocol

from kelp.core.clock import Clock
from kelp.core.errors import PeerRefused, ProtocolError
from kelp.registry.etcd_client import Entry, Reading
from kelp.registry.record_seal import RecordSeal, RecordT, Refusals
from kelp.registry.store import NEVER_S

NO_LEASE = 0
_MIN_TTL_S = 2


class LeasedKeys(Protocol):
    """What `registry.etcd_client.EtcdClient` offers."""

    def read_below(self, prefix: str) -> Reading:
        """Everything whose key begins with `prefix`."""

    def read(self, key: str) -> Entry | None:
        """One key."""

    def put(self, key: str, value: bytes, lease_id: int) -> bool:
        """Write a key that goes with a lease; False if there is no such lease."""

    def delete_if(self, key: str, revision: int) -> None:
        """Remove a key unless it has changed."""

    def grant(self, ttl_s: int) -> int:
        """A new lease."""

    def keep_alive(self, lease_id: int) -> bool:
        """Begin a lease's time anew; False if there is no such lease."""

    def revoke(self, lease_id: int) -> None:
        """End a lease and its keys."""


class EtcdRecords(Generic[RecordT]):
    """Records of one kind; implements `registry.store.RecordStore`.

    Args:
        folder: Prefix of their keys, which ends in a slash.
        seal: Writes and reads them.
        expiry_s: Time of a lease; etcd counts whole seconds, two at least. With `NEVER_S` there is none.
    """

    def __init__(self, keys: LeasedKeys, folder: str, seal: RecordSeal[RecordT], expiry_s: float, clock: Clock) -> None:
        self._keys = keys
        self._folder = folder
        self._seal = seal
        self._is_eternal = expiry_s >= NEVER_S
        self._ttl_s = max(_MIN_TTL_S, math.ceil(expiry_s))
        self._clock = clock
        self._leases: dict[str, int] = {}
        self._refusals = Refusals()
        self._reading = threading.Lock()
        self._known: dict[str, RecordT] = {}
        self._revision = 0
        self._was_away = False
        self._doubted_until_s = 0.0

    def write(self, name: str, record: RecordT) -> None:
        """See `RecordStore`; the heartbeat is this host's own and only tells one renewal from another."""
        place = self._seal.place(name)
        stamped = record.model_copy(update={"heartbeat_ns": self._clock.wall_ns()})
        key, value = self._folder + place, self._seal.written(stamped, place)
        if self._is_eternal:
            self._keys.put(key, value, NO_LEASE)
            return
        lease_id = self._leases.get(name)
        if lease_id is not None and self._keys.keep_alive(lease_id) and self._keys.put(key, value, lease_id):
            return
        lease_id = self._leases[name] = self._keys.grant(self._ttl_s)
        if not self._keys.put(key, value, lease_id):
            raise ConnectionError(f"etcd has lost the lease of {place} at once")

    def remove_if(self, name: str, is_it: Callable[[RecordT], bool]) -> None:
        """See `RecordStore`."""
        entry = self._keys.read(self._folder + self._seal.place(name))
        record = None if entry is None else self._record(entry)
        if entry is not None and record is not None and is_it(record):
            self._keys.delete_if(entry.key, entry.revision)
        lease_id = self._leases.pop(name, None)
        if lease_id is not None:
            self._keys.revoke(lease_id)

    def live(self) -> list[RecordT]:
        """See `RecordStore`."""
        with self._reading:
            try:
                reading = self._keys.read_below(self._folder)
            except OSError:
                self._was_away = True
                raise
            now_s = self._clock.monotonic_s()
            if self._was_away or reading.revision < self._revision:
                self._doubted_until_s = now_s + self._ttl_s
            self._was_away, self._revision = False, reading.revision
            found = self._found(reading)
            self._known = {**self._known, **found} if now_s < self._doubted_until_s else found
            return [record for _, record in sorted(self._known.items())]

    def sweep(self) -> int:
        """See `RecordStore`; etcd removes the dead itself."""
        return 0

    def _found(self, reading: Reading) -> dict[str, RecordT]:
        self._refusals.keep({entry.key for entry in reading.entries})
        found = {entry.key: self._record(entry) for entry in reading.entries}
        return {key: record for key, record in found.items() if record is not None}

    def _record(self, entry: Entry) -> RecordT | None:
        """The record; None if it is no use, which is said once."""
        try:
            record = self._seal.read(entry.value, entry.key.removeprefix(self._folder))
        except (ProtocolError, PeerRefused) as error:
            self._refusals.note(entry.key, error)
            return None
        self._refusals.clear(entry.key)
        return record
