"""Records in an etcd that is away, forgets, expires leases, hears of strangers; the real one is in tests/contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kelp.core.clock import FakeClock
from kelp.core.peer_auth import PeerToken
from kelp.registry.base import ROUTER_RECORD, RouterRecord
from kelp.registry.etcd import NO_LEASE, EtcdRecords
from kelp.registry.etcd_client import Entry, Reading
from kelp.registry.kinds import ROUTER_SUFFIX
from kelp.registry.record_seal import MAX_RECORD_BYTES, RecordSeal
from kelp.registry.store import NEVER_S

EXPIRY_S = 5.0
FOLDER = "/kelp/routers/"
TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)


class FakeEtcd:
    """Keys and leases; time is a clock's."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.keys: dict[str, tuple[bytes, int, int]] = {}
        self.leases: dict[int, tuple[float, float]] = {}
        self.revision = 1
        self.num_granted = 0
        self.is_away = False
        self.loses_leases = False

    def forget(self) -> None:
        self.keys, self.leases, self.revision = {}, {}, 1

    def _look(self) -> None:
        if self.is_away:
            raise ConnectionError("etcd is away")
        now_s = self._clock.monotonic_s()
        for lease_id in [lease_id for lease_id, (end_s, _) in self.leases.items() if end_s <= now_s]:
            self._end(lease_id)

    def _end(self, lease_id: int) -> None:
        self.leases.pop(lease_id, None)
        dead = [key for key, (_, _, owner) in self.keys.items() if owner == lease_id]
        self.revision += bool(dead)
        for key in dead:
            del self.keys[key]

    def read_below(self, prefix: str) -> Reading:
        self._look()
        found = [Entry(key, value, revision) for key, (value, revision, _) in self.keys.items()]
        return Reading(tuple(sorted(entry for entry in found if entry.key.startswith(prefix))), self.revision)

    def read(self, key: str) -> Entry | None:
        self._look()
        return Entry(key, *self.keys[key][:2]) if key in self.keys else None

    def put(self, key: str, value: bytes, lease_id: int) -> bool:
        self._look()
        if lease_id not in (*self.leases, NO_LEASE) or self.loses_leases:
            return False
        self.revision += 1
        self.keys[key] = (value, self.revision, lease_id)
        return True

    def delete_if(self, key: str, revision: int) -> None:
        self._look()
        if key in self.keys and self.keys[key][1] == revision:
            self.revision += 1
            del self.keys[key]

    def grant(self, ttl_s: int) -> int:
        self._look()
        self.num_granted += 1
        self.leases[self.num_granted] = (self._clock.monotonic_s() + ttl_s, ttl_s)
        return self.num_granted

    def keep_alive(self, lease_id: int) -> bool:
        self._look()
        if lease_id not in self.leases:
            return False
        ttl_s = self.leases[lease_id][1]
        self.leases[lease_id] = (self._clock.monotonic_s() + ttl_s, ttl_s)
        return True

    def revoke(self, lease_id: int) -> None:
        self._look()
        self._end(lease_id)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def etcd(clock: FakeClock) -> FakeEtcd:
    return FakeEtcd(clock)


@pytest.fixture
def open_one(etcd: FakeEtcd, clock: FakeClock) -> Callable[..., EtcdRecords[RouterRecord]]:
    """Another process's records, each time."""

    def make(
        token: PeerToken | None = None, own_clock: FakeClock = clock, expiry_s: float = EXPIRY_S
    ) -> EtcdRecords[RouterRecord]:
        return EtcdRecords(etcd, FOLDER, RecordSeal(ROUTER_SUFFIX, ROUTER_RECORD, token), expiry_s, own_clock)

    return make


Open = Callable[..., EtcdRecords[RouterRecord]]


def record(router_id: str = "r", epoch: int = 1) -> RouterRecord:
    return RouterRecord(router_id=router_id, epoch=epoch, loads_endpoint="host:1", answers_endpoint="host:2")


def names(records: EtcdRecords[RouterRecord]) -> list[str]:
    return [found.router_id for found in records.live()]


def test_heartbeats_keep_one_lease_alive(open_one: Open, etcd: FakeEtcd, clock: FakeClock) -> None:
    writer = open_one()
    for _ in range(5):
        writer.write("r", record())
        clock.advance(EXPIRY_S - 1)
    assert names(open_one()) == ["r"]
    assert etcd.num_granted == 1


def test_who_stops_is_gone_after_one_lease_and_registers_again_by_himself(
    open_one: Open, etcd: FakeEtcd, clock: FakeClock
) -> None:
    writer, reader = open_one(), open_one()
    writer.write("r", record())
    clock.advance(EXPIRY_S)
    assert names(reader) == []
    writer.write("r", record())
    assert names(reader) == ["r"]
    assert etcd.num_granted == 2


def test_hosts_whose_clocks_are_hours_apart_see_each_other_and_miss_the_dead(open_one: Open, clock: FakeClock) -> None:
    ahead, behind = FakeClock(1000.0 + 7200.0), FakeClock(10.0)
    early, late, reader = open_one(own_clock=ahead), open_one(own_clock=behind), open_one()
    early.write("early", record("early"))
    late.write("late", record("late"))
    assert names(reader) == names(early) == names(late) == ["early", "late"]
    clock.advance(EXPIRY_S - 1)
    late.write("late", record("late"))
    clock.advance(1)
    assert names(reader) == names(early) == names(late) == ["late"]


def test_a_lease_is_of_whole_seconds_and_of_no_fewer_than_etcd_takes(open_one: Open, etcd: FakeEtcd) -> None:
    open_one(expiry_s=0.5).write("a", record())
    open_one(expiry_s=4.2).write("b", record())
    assert [ttl_s for _, ttl_s in etcd.leases.values()] == [2, 5]


def test_what_never_expires_has_no_lease(open_one: Open, etcd: FakeEtcd, clock: FakeClock) -> None:
    open_one(expiry_s=NEVER_S).write("r", record())
    clock.advance(10 * EXPIRY_S)
    assert names(open_one()) == ["r"]
    assert not etcd.leases


def test_while_etcd_is_away_nobody_is_told_that_there_is_nobody(open_one: Open, etcd: FakeEtcd) -> None:
    writer, reader = open_one(), open_one()
    writer.write("r", record())
    etcd.is_away = True
    for use in (reader.live, lambda: writer.write("r", record()), lambda: writer.remove_if("r", lambda _: True)):
        with pytest.raises(OSError, match="away"):
            use()


def test_whom_etcd_misses_when_it_is_back_has_one_lease_of_time_to_register_again(
    open_one: Open, etcd: FakeEtcd, clock: FakeClock
) -> None:
    alive, reader = open_one(), open_one()
    alive.write("alive", record("alive"))
    open_one().write("dead", record("dead"))
    assert names(reader) == ["alive", "dead"]
    etcd.is_away = True
    with pytest.raises(OSError, match="away"):
        reader.live()
    clock.advance(60.0)
    etcd.is_away = False
    assert names(reader) == ["alive", "dead"]
    alive.write("alive", record("alive"))
    clock.advance(EXPIRY_S - 1)
    alive.write("alive", record("alive"))
    assert names(reader) == ["alive", "dead"]
    clock.advance(1)
    assert names(reader) == ["alive"]


def test_an_etcd_that_knows_less_than_before_is_doubted_although_nobody_saw_it_away(
    open_one: Open, etcd: FakeEtcd, clock: FakeClock
) -> None:
    writer, reader = open_one(), open_one()
    for _ in range(3):
        writer.write("r", record())
    assert names(reader) == ["r"]
    etcd.forget()
    assert names(reader) == ["r"]
    clock.advance(EXPIRY_S)
    assert names(reader) == []


def test_a_record_that_was_renewed_meanwhile_is_the_new_one(open_one: Open, etcd: FakeEtcd) -> None:
    writer, reader = open_one(), open_one()
    writer.write("r", record(epoch=1))
    writer.write("r", record(epoch=1))
    reader.live()
    etcd.forget()
    writer.write("r", record(epoch=2))
    assert [found.epoch for found in reader.live()] == [2]


def test_a_removed_record_is_gone_at_once_with_its_lease(open_one: Open, etcd: FakeEtcd) -> None:
    writer, reader = open_one(), open_one()
    writer.write("r", record())
    assert names(reader) == ["r"]
    writer.remove_if("r", lambda found: found.epoch == 1)
    writer.remove_if("r", lambda found: found.epoch == 1)
    assert names(reader) == []
    assert not etcd.leases


def test_a_late_removal_leaves_the_next_incarnation(open_one: Open) -> None:
    former, latter = open_one(), open_one()
    former.write("r", record(epoch=1))
    latter.write("r", record(epoch=2))
    former.remove_if("r", lambda found: found.epoch == 1)
    assert [found.epoch for found in latter.live()] == [2]


def test_a_lease_that_is_lost_at_once_is_an_error_of_the_registry(open_one: Open, etcd: FakeEtcd) -> None:
    etcd.loses_leases = True
    with pytest.raises(OSError, match=r"lost the lease of r\.router\.json"):
        open_one().write("r", record())


@pytest.mark.parametrize(
    ("value", "reason"),
    [(b"{}", "Field required"), (b"\xff", "Invalid JSON"), (b" " * (MAX_RECORD_BYTES + 1), "exceeds the limit")],
    ids=["no record", "no JSON", "too long"],
)
def test_what_is_no_record_is_skipped_and_said_once(
    open_one: Open, etcd: FakeEtcd, caplog: pytest.LogCaptureFixture, value: bytes, reason: str
) -> None:
    open_one().write("r", record())
    etcd.keys[f"{FOLDER}evil.router.json"] = (value, 7, 0)
    reader = open_one()
    assert names(reader) == names(reader) == ["r"]
    assert caplog.text.count(reason) == 1


@pytest.mark.parametrize("change", ["another token", "no token", "copied to another name"])
def test_what_no_peer_wrote_for_this_name_does_not_count(open_one: Open, etcd: FakeEtcd, change: str) -> None:
    tokens = {"another token": OTHER, "no token": None, "copied to another name": TOKEN}
    open_one(tokens[change]).write("r", record())
    if change == "copied to another name":
        key = f"{FOLDER}r.router.json"
        etcd.keys[f"{FOLDER}s.router.json"] = etcd.keys.pop(key)
    assert names(open_one(TOKEN)) == []


def test_the_bytes_are_those_of_the_directory(open_one: Open, etcd: FakeEtcd) -> None:
    open_one(TOKEN).write("a/b", record())
    ((key, (value, _, _)),) = etcd.keys.items()
    assert key == f"{FOLDER}a%2Fb.router.json"
    seal = RecordSeal(ROUTER_SUFFIX, ROUTER_RECORD, TOKEN)
    assert seal.read(value, seal.place("a/b")).router_id == "r"
