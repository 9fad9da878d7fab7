"""Three hosts, each with a tritonserver of its own, that know each other through etcd; one's clock is an hour ahead.

The hosts are network namespaces, so that their links can be cut, slowed and disturbed.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_scenes import require_server
from many_hosts import Hosts, Load, Streams, by_router, prompt, said

from kelp.core.peer_auth import make_token_file
from support.etcd_server import EtcdServer, why_no_etcd
from support.host_server import HostServer, forget_skew, skewed, why_no_skew
from support.llm_client import Answer
from support.net_hosts import Network, why_no_network
from support.seeded_relay import SeededRelay
from support.waiting import wait_until

HOUR_S = 3600
MOCK = ("--engine", "mock")
EXPIRY_S = 4
SETTINGS: dict[str, object] = {
    "kv_manager.enabled": False,
    "registry.expiry_s": EXPIRY_S,
    "registry.heartbeat_s": 0.5,
    "router.policy": "round-robin",
    "router.idle_timeout_s": 5,
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require_server()
    if reason := why_no_etcd() or why_no_network() or why_no_skew():
        pytest.skip(reason)
    token = Path(tmp_path_factory.mktemp("multi-host")) / "token"
    make_token_file(token)
    with Network("near", "far", "third") as network, EtcdServer(network.address, network.prefix) as etcd:
        settings = {**SETTINGS, "registry.url": f"etcd://{etcd.endpoint}/kelp", "peers.token_file": token}
        near, third = (HostServer(network.hosts[name], settings, arguments=MOCK) for name in ("near", "third"))
        far = HostServer(network.hosts["far"], settings, prefix=skewed(HOUR_S), arguments=MOCK)
        servers = (near, far, third)
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(HostServer.start, servers))
                yield Hosts(network, etcd, *servers)
                list(pool.map(HostServer.stop, (near, third)))
            # Triton takes half a minute to end under faketime.
            far.kill()
            shutil.rmtree(far.run_folder)
        finally:
            for server in servers:
                server.kill()
            forget_skew()


@pytest.fixture
def hosts(fleet: Hosts) -> Iterator[Hosts]:
    """The hosts; afterwards each router uses all of them and knows what they hold, and no worker holds anything."""
    yield fleet
    for server in fleet.servers:
        for worker in fleet.servers:
            wait_until(lambda s=server, w=worker: serves_at(fleet, s, w), "requests to all hosts", 30.0)  # type: ignore[misc]
    fleet.converge()
    for server in fleet.servers:
        server.wait_quiet()


def serves_at(hosts: Hosts, server: HostServer, worker: HostServer) -> bool:
    return server.ask(text_input=prompt(), max_tokens=2).last.worker_ids == [hosts.worker(worker)]


def test_each_host_sends_requests_to_all_and_gets_the_same_tokens(hosts: Hosts) -> None:
    questions = [prompt() for _ in range(9)]

    def ask(server: HostServer) -> list[Answer]:
        return [server.ask(text_input=question, max_tokens=12) for question in questions]

    with ThreadPoolExecutor() as pool:
        from_all = list(pool.map(ask, hosts.servers))
    for answers in from_all:
        assert [answer.token_ids for answer in answers] == [said(question, 12) for question in questions]
        workers = {worker for answer in answers for worker in answer.last.worker_ids}
        assert workers == {hosts.worker(server) for server in hosts.servers}
        for answer in answers:
            times = [answer.last.number(f"{name}_time_ns") for name in ("arrival", "first_scheduled", "first_token")]
            assert times == sorted(times)


def streams_to_far(hosts: Hosts) -> Streams:
    """Streams of the near and the third router; each router has sent one to the far host's worker."""
    for _ in range(10):
        streams = Streams((hosts.near, hosts.third), 3)
        if hosts.far.statuses()["decode"].num_running == 2:
            return streams
        streams.cancel()
        for server in hosts.servers:
            server.wait_quiet()
    raise AssertionError("two streams never went to the far host")


def check_starts(hosts: Hosts, streams: Streams, attempts: dict[str, int]) -> None:
    """Each stream was begun at as many workers as its router says, and every router's index says at which."""
    hosts.converge()
    starts = dict(zip(streams.questions, hosts.starts(streams.questions), strict=True))
    assert {question: len(workers) for question, workers in starts.items()} == attempts
    for server, questions in by_router(hosts, streams.questions).items():
        for question in questions:
            assert hosts.overlaps(server, question) == starts[question]


def test_the_streams_of_a_host_that_is_cut_off_go_on_at_the_others_once_and_it_comes_back(hosts: Hosts) -> None:
    other, streams = prompt(), streams_to_far(hosts)
    load = Load((hosts.near, hosts.third))
    hosts.network.cut(hosts.far.host)
    try:
        # Cut off from etcd as well, it serves who is with it.
        assert hosts.far.ask_from_inside(text_input=other, max_tokens=8)["output_ids"] == said(other, 8)
        streams.finish()
        load.wait(8)
    finally:
        hosts.network.mend(hosts.far.host)
        load.stop()
    attempts = streams.attempts()
    assert sorted(attempts.values()) == [1, 1, 1, 1, 2, 2]
    check_starts(hosts, streams, attempts)


def test_hosts_that_lose_etcd_but_not_each_other_serve_all_and_are_served(hosts: Hosts) -> None:
    streams, load = Streams(hosts.servers, 3), Load(hosts.servers)
    lost = (hosts.near, hosts.third)
    for server in lost:
        hosts.network.hide(server.host)
    try:
        wait_until(lambda: len(hosts.near.all_records()) == 1, "the leases of two hosts to end", 30.0)
        load.wait(6)
        streams.finish()
    finally:
        for server in lost:
            hosts.network.show(server.host)
        load.stop()
    attempts = streams.attempts()
    assert all(attempts[question] == 1 for server in lost for question in streams.asked_of(server))
    wait_until(lambda: len(hosts.near.all_records()) == 3, "both to register again", 30.0)
    check_starts(hosts, streams, attempts)


@pytest.mark.parametrize(
    ("change", "down_s"),
    [(lambda etcd: None, EXPIRY_S + 1), (EtcdServer.forget, 0)],
    ids=["as it was, after more than a lease", "without its memory"],
)
def test_no_request_fails_while_etcd_is_dead_nor_when_it_comes_back(
    hosts: Hosts, change: Callable[[EtcdServer], None], down_s: float
) -> None:
    load = Load(hosts.servers)
    load.wait(6)
    hosts.etcd.kill()
    try:
        threading.Event().wait(down_s)
        load.wait(6)
        change(hosts.etcd)
    finally:
        hosts.etcd.start()
    wait_until(lambda: len(hosts.near.all_records()) == 3, "all workers to register again", 30.0)
    load.wait(8)
    load.stop()


def test_a_router_that_starts_while_etcd_is_dead_serves_by_what_was_known_last(hosts: Hosts) -> None:
    hosts.converge()
    hosts.etcd.kill()
    try:
        hosts.near.stub("llm").kill()
        wait_until(lambda: hosts.near.answers(text_input=prompt()), "the router to be back", 60.0)
        for holder in hosts.servers:
            question = prompt()
            answer = hosts.near.generate(text_input=question, kelp_worker=hosts.worker(holder), max_tokens=8)
            assert answer["output_ids"] == said(question, 8)
    finally:
        hosts.etcd.start()
    wait_until(lambda: len(hosts.near.all_records()) == 3, "all workers to register again", 30.0)
    load = Load(hosts.servers)
    load.wait(6)
    load.stop()


def test_requests_to_a_host_behind_a_slow_link_are_answered(hosts: Hosts) -> None:
    question = prompt() * 12
    hosts.network.slow_down(hosts.far.host, "256kbit")
    try:
        answers = [hosts.near.ask(text_input=question, max_tokens=100, ignore_eos=True) for _ in range(6)]
    finally:
        hosts.network.speed_up(hosts.far.host)
    assert [answer.token_ids for answer in answers] == [said(question, 100)] * 6
    assert hosts.worker(hosts.far) in {worker for answer in answers for worker in answer.last.worker_ids}


def test_stalls_and_resets_between_router_and_worker_lose_no_token(hosts: Hosts) -> None:
    questions = [prompt() for _ in range(9)]
    direct = hosts.far.records()["decode"].direct_endpoint
    ports = [hosts.far.grpc_port, int(direct.rpartition(":")[2])]
    relay = SeededRelay(hosts.network.prefix, 6, hosts.far.host.address, ports)
    ends = (hosts.near.host, hosts.far.host, ports)
    hosts.network.divert(*ends)

    def ask(question: str) -> list[int]:
        return hosts.near.ask(text_input=question, max_tokens=150, ignore_eos=True).token_ids

    try:
        with ThreadPoolExecutor(len(questions)) as pool:
            answers = [answer for _ in range(2) for answer in pool.map(ask, questions)]
        counts = relay.stop()
    finally:
        hosts.network.undivert(*ends)
        relay.kill()
    assert answers == 2 * [said(question, 150) for question in questions]
    assert min(counts.values()) > 0, counts
