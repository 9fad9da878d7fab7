"""What every registry keeps its word on: the directory of one host, and a real etcd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etcd_security import add_root, tls_files

from kelp.core.config_registry import RegistryConfig
from kelp.core.peer_auth import PeerToken
from kelp.registry.access import RegistryAccess, open_registry
from kelp.registry.base import RouterRecord, TrafficRecord
from kelp.registry.etcd_client import EtcdClient
from support.etcd_server import EtcdServer, why_no_etcd
from support.waiting import wait_until

EXPIRY_S = 2.0
TOKEN, OTHER = PeerToken(b"t" * 16), PeerToken(b"o" * 16)
Open = Callable[[PeerToken | None], RegistryAccess]
_prefixes = (f"/test-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    if (reason := why_no_etcd()) is not None:
        pytest.skip(reason)
    with EtcdServer() as server:
        yield server


def config_of(etcd: EtcdServer, prefix: str = "/kelp") -> RegistryConfig:
    return RegistryConfig(url=f"etcd://{etcd.endpoint}{prefix}", expiry_s=EXPIRY_S)


@pytest.fixture(params=["directory", "etcd"])
def open_one(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Another process's way into the same registry, each time."""
    if request.param == "directory":
        config = RegistryConfig(path=tmp_path, expiry_s=EXPIRY_S)
    else:
        config = config_of(request.getfixturevalue("etcd"), next(_prefixes))
    return lambda token: open_registry(config, token)


def record(router_id: str = "10.0.0.1:8001/llm_0", epoch: int = 1, endpoint: str = "host:1") -> RouterRecord:
    return RouterRecord(router_id=router_id, epoch=epoch, loads_endpoint=endpoint, answers_endpoint="host:2")


def names(registry: RegistryAccess) -> list[str]:
    return [found.router_id for found in registry.routers.snapshot()]


def test_records_are_found_by_others_in_the_order_of_their_names_and_by_kind(open_one: Open) -> None:
    writer, reader = open_one(None), open_one(None)
    assert names(reader) == []
    for name in ("b/1", "a/2"):
        writer.routers.publish(record(name))
    assert names(reader) == ["a/2", "b/1"]
    assert reader.workers.snapshot() == reader.kv_managers.snapshot() == []


def test_a_renewal_replaces_the_record_and_is_told_from_the_former_one(open_one: Open) -> None:
    writer, reader = open_one(None), open_one(None)
    writer.routers.publish(record())
    (first,) = reader.routers.snapshot()
    writer.routers.publish(record(endpoint="host:3"))
    (second,) = reader.routers.snapshot()
    assert (first.loads_endpoint, second.loads_endpoint) == ("host:1", "host:3")
    assert first.heartbeat_ns != second.heartbeat_ns


def test_a_withdrawn_record_is_gone_and_a_late_withdrawal_hits_nobody_else(open_one: Open) -> None:
    former, latter, reader = open_one(None), open_one(None), open_one(None)
    former.routers.publish(record(epoch=1))
    latter.routers.publish(record(epoch=2))
    former.routers.withdraw(record().router_id, 1)
    assert [found.epoch for found in reader.routers.snapshot()] == [2]
    latter.routers.withdraw(record().router_id, 2)
    latter.routers.withdraw(record().router_id, 2)
    assert names(reader) == []


@pytest.mark.slow
def test_who_is_renewed_lives_and_who_is_not_expires(open_one: Open) -> None:
    writer, reader = open_one(None), open_one(None)
    writer.routers.publish(record("dead"))
    alive = open_one(None)

    def is_only_one_left() -> bool:
        alive.routers.publish(record("alive"))
        found = names(reader)
        assert "alive" in found
        return found == ["alive"]

    wait_until(is_only_one_left, "the end of the dead", 30.0)


@pytest.mark.parametrize("writer", [None, OTHER], ids=["nothing", "another token"])
def test_records_of_strangers_do_not_count_and_are_said_once(
    open_one: Open, writer: PeerToken | None, caplog: pytest.LogCaptureFixture
) -> None:
    open_one(TOKEN).routers.publish(record("peer"))
    open_one(writer).routers.publish(record("stranger"))
    caplog.clear()
    reader = open_one(TOKEN)
    assert names(reader) == names(reader) == ["peer"]
    assert caplog.text.count("nobody who knows the token of peers.token_file wrote it") == 1


def test_shares_of_versions_are_replaced_and_stay_without_a_lease(open_one: Open) -> None:
    writer, reader = open_one(None), open_one(None)
    assert reader.traffic.snapshot() == []
    for share in (1.0, 0.5):
        writer.traffic.set(TrafficRecord(shares={"base": share}))
    assert [found.shares for found in reader.traffic.snapshot()] == [{"base": 0.5}]


@pytest.mark.slow
def test_an_etcd_that_is_killed_and_comes_back_is_used_again_by_itself(etcd: EtcdServer) -> None:
    config = config_of(etcd, next(_prefixes))
    writer, reader = open_registry(config, None), open_registry(config, None)
    writer.routers.publish(record())
    assert names(reader) == [record().router_id]
    etcd.kill()
    for use in (lambda: writer.routers.publish(record()), reader.routers.snapshot):
        with pytest.raises(OSError, match=etcd.endpoint):
            use()
    etcd.start()
    assert names(reader) == [record().router_id]
    writer.routers.publish(record(endpoint="host:3"))
    assert [found.loads_endpoint for found in reader.routers.snapshot()] == ["host:3"]


@pytest.mark.slow
def test_an_etcd_that_comes_back_without_its_memory_makes_nobody_disappear(etcd: EtcdServer) -> None:
    config = config_of(etcd, next(_prefixes))
    writer, reader, stranger = (open_registry(config, None) for _ in range(3))
    writer.routers.publish(record("lives"))
    stranger.routers.publish(record("died meanwhile"))
    assert names(reader) == ["died meanwhile", "lives"]
    etcd.kill()
    etcd.forget()
    etcd.start()
    assert names(reader) == ["died meanwhile", "lives"]

    def is_only_one_left() -> bool:
        writer.routers.publish(record("lives"))
        found = names(reader)
        assert "lives" in found
        return found == ["lives"]

    wait_until(is_only_one_left, "the end of the dead", 30.0)


@pytest.mark.slow
def test_an_etcd_that_is_frozen_costs_a_bounded_time_and_is_used_again(etcd: EtcdServer) -> None:
    config = config_of(etcd, next(_prefixes))
    reader = open_registry(config, None)
    assert names(reader) == []
    etcd.freeze()
    try:
        with pytest.raises(OSError, match="DEADLINE_EXCEEDED"):
            reader.routers.snapshot()
    finally:
        etcd.thaw()
    wait_until(lambda: _answers(reader), "an answer", 30.0)


def test_another_member_is_asked_when_the_first_is_gone(etcd: EtcdServer) -> None:
    prefix = next(_prefixes)
    two = RegistryConfig(url=f"etcd://127.0.0.1:1,{etcd.endpoint}{prefix}", expiry_s=EXPIRY_S)
    open_registry(two, None).routers.publish(record())
    assert names(open_registry(config_of(etcd, prefix), None)) == [record().router_id]


@pytest.mark.slow
def test_an_etcd_that_asks_for_a_password_gets_it_also_after_a_restart(tmp_path: Path) -> None:
    if (reason := why_no_etcd()) is not None:
        pytest.skip(reason)
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    secret.chmod(0o600)
    with EtcdServer() as etcd:
        add_root(etcd.endpoint, "open sesame")
        anonymous = open_registry(config_of(etcd), None)
        with pytest.raises(OSError, match="user name is empty"):
            anonymous.routers.snapshot()
        config = RegistryConfig(url=f"etcd://root@{etcd.endpoint}/kelp", password_file=secret, expiry_s=EXPIRY_S)
        registry = open_registry(config, None)
        registry.routers.publish(record())
        etcd.kill()
        etcd.start()
        registry.routers.publish(record("later"))
        assert names(registry) == [record().router_id, "later"]


@pytest.mark.slow
def test_an_etcd_behind_tls_is_believed_for_its_certificate_and_asks_for_ours(tmp_path: Path) -> None:
    if (reason := why_no_etcd()) is not None:
        pytest.skip(reason)
    ca, cert, key = tls_files(tmp_path)
    options = ("--client-cert-auth", f"--trusted-ca-file={ca}", f"--cert-file={cert}", f"--key-file={key}")
    with EtcdServer(arguments=options) as etcd:
        config = RegistryConfig(url=f"etcds://{etcd.endpoint}/kelp", ca_file=ca, cert_file=cert, key_file=key)
        open_registry(config, None).routers.publish(record())
        assert names(open_registry(config, None)) == [record().router_id]
        for without in ({"ca_file": None}, {"cert_file": None, "key_file": None}):
            with pytest.raises(OSError, match="UNAVAILABLE"):
                open_registry(config.model_copy(update=without), None).routers.snapshot()


def test_a_key_is_not_removed_that_has_changed_meanwhile(etcd: EtcdServer) -> None:
    config = config_of(etcd)
    assert config.etcd is not None
    client = EtcdClient(config, config.etcd)
    lease_id = client.grant(5)
    assert client.put("/keys/a", b"1", lease_id)
    before = client.read("/keys/a")
    assert before is not None
    assert client.put("/keys/a", b"2", lease_id)
    client.delete_if("/keys/a", before.revision)
    assert [entry.value for entry in client.read_below("/keys/").entries] == [b"2"]
    client.revoke(lease_id)
    client.revoke(lease_id)
    assert client.read("/keys/a") is None
    assert not client.keep_alive(lease_id)
    assert not client.put("/keys/a", b"3", lease_id)
    client.close()


def _answers(registry: RegistryAccess) -> bool:
    try:
        registry.routers.snapshot()
    except OSError:
        return False
    return True
