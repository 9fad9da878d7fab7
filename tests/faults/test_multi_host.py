"""Two hosts, each with a tritonserver of its own, that know each other through etcd; one's clock is an hour ahead.

The hosts are network namespaces, so that their links can be cut, slowed and disturbed.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_scenes import require_server

from kelp.core.peer_auth import make_token_file
from kelp.executor.mock.language import Vocabulary
from kelp.text.tokenizer import Tokenizer
from support.etcd_server import EtcdServer, why_no_etcd
from support.host_server import HostServer, forget_skew, skewed, why_no_skew
from support.llm_client import Answer, Call
from support.net_hosts import Network, why_no_network
from support.seeded_relay import SeededRelay
from support.serving import MODEL
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
LONG_TOKENS = 600
"""More than five seconds of the mock's steps."""
_numbers = itertools.count()


class Hosts(NamedTuple):
    """All of it; `near` is asked, `far` is what happens to somebody."""

    network: Network
    etcd: EtcdServer
    near: HostServer
    far: HostServer

    def worker(self, host: HostServer) -> str:
        return f"{host.grpc_endpoint}/decode"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require_server()
    if reason := why_no_etcd() or why_no_network() or why_no_skew():
        pytest.skip(reason)
    token = Path(tmp_path_factory.mktemp("multi-host")) / "token"
    make_token_file(token)
    with Network("near", "far") as network, EtcdServer(network.address, network.prefix) as etcd:
        settings = {**SETTINGS, "registry.url": f"etcd://{etcd.endpoint}/kelp", "peers.token_file": token}
        near = HostServer(network.hosts["near"], settings, arguments=MOCK)
        far = HostServer(network.hosts["far"], settings, prefix=skewed(HOUR_S), arguments=MOCK)
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(HostServer.start, (near, far)))
            yield Hosts(network, etcd, near, far)
            near.stop()
            # Triton takes half a minute to end under faketime.
            far.kill()
            shutil.rmtree(far.run_folder)
        finally:
            for server in (near, far):
                server.kill()
            forget_skew()


@pytest.fixture
def hosts(fleet: Hosts) -> Iterator[Hosts]:
    """The hosts; afterwards each router uses both, and no worker holds anything."""
    yield fleet
    for server in (fleet.near, fleet.far):
        for worker in (fleet.near, fleet.far):
            wait_until(lambda s=server, w=worker: serves_at(fleet, s, w), "requests to both hosts", 30.0)  # type: ignore[misc]
    for server in (fleet.near, fleet.far):
        server.wait_quiet()


@cache
def _language() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer(MODEL)
    return tokenizer, Vocabulary(tokenizer.vocab_size, tuple(sorted(tokenizer.eos_token_ids)))


def said(question: str, num_tokens: int) -> list[int]:
    """What the mock says to a prompt."""
    tokenizer, vocabulary = _language()
    return vocabulary.continuation(tokenizer.encode(question), num_tokens)


def prompt() -> str:
    return f"Ship {next(_numbers)} left the harbour with salt and oranges."


def serves_at(hosts: Hosts, server: HostServer, worker: HostServer) -> bool:
    return server.ask(text_input=prompt(), max_tokens=2).last.worker_ids == [hosts.worker(worker)]


def test_each_host_sends_requests_to_both_and_gets_the_same_tokens(hosts: Hosts) -> None:
    questions = [prompt() for _ in range(8)]

    def ask(server: HostServer) -> list[Answer]:
        return [server.ask(text_input=question, max_tokens=12) for question in questions]

    with ThreadPoolExecutor() as pool:
        from_both = list(pool.map(ask, (hosts.near, hosts.far)))
    for answers in from_both:
        assert [answer.token_ids for answer in answers] == [said(question, 12) for question in questions]
        workers = {worker for answer in answers for worker in answer.last.worker_ids}
        assert workers == {hosts.worker(hosts.near), hosts.worker(hosts.far)}
        for answer in answers:
            times = [answer.last.number(f"{name}_time_ns") for name in ("arrival", "first_scheduled", "first_token")]
            assert times == sorted(times)


def stream_at_far(hosts: Hosts, question: str) -> tuple[Call, list[int]]:
    """A stream from the near router that the far host's worker computes, and the tokens that have come."""
    for _ in range(10):
        call = hosts.near.open(text_input=question, max_tokens=LONG_TOKENS, ignore_eos=True)
        tokens = call.next().token_ids
        if hosts.far.statuses()["decode"].num_running == 1:
            return call, tokens
        call.cancel()
        hosts.near.wait_quiet()
    raise AssertionError("no stream went to the far host")


def test_a_stream_whose_host_is_cut_off_goes_on_elsewhere_and_the_host_comes_back(hosts: Hosts) -> None:
    question, other = prompt(), prompt()
    call, tokens = stream_at_far(hosts, question)
    with call:
        hosts.network.cut(hosts.far.host)
        try:
            # Cut off from etcd as well, it serves who is with it.
            assert hosts.far.ask_from_inside(text_input=other, max_tokens=8)["output_ids"] == said(other, 8)
            rest = call.answer()
        finally:
            hosts.network.mend(hosts.far.host)
    assert tokens + rest.token_ids == said(question, LONG_TOKENS)
    assert rest.last.number("num_output_tokens") == LONG_TOKENS
    assert rest.last.worker_ids == [hosts.worker(hosts.near)]


class Load:
    """Requests to both hosts without a pause; every answer is compared."""

    def __init__(self, servers: tuple[HostServer, ...]) -> None:
        self._questions = [prompt() for _ in range(4)]
        self._expected = [said(question, 24) for question in self._questions]
        self._end = threading.Event()
        self.num_right = 0
        self.wrong: list[object] = []
        self._threads = [threading.Thread(target=self._run, args=(server,), daemon=True) for server in servers]
        for thread in self._threads:
            thread.start()

    def _run(self, server: HostServer) -> None:
        for number in itertools.cycle(range(len(self._questions))):
            if self._end.is_set():
                return
            try:
                tokens = server.ask(text_input=self._questions[number], max_tokens=24).token_ids
            except Exception as error:
                self.wrong.append(error)
                return
            if tokens == self._expected[number]:
                self.num_right += 1
            else:
                self.wrong.append(tokens)

    def wait(self, count: int) -> None:
        """So many more answers."""
        goal = self.num_right + count
        wait_until(lambda: self.num_right >= goal or bool(self.wrong), f"{count} more answers", 60.0)

    def stop(self) -> None:
        """All answers were right."""
        self._end.set()
        for thread in self._threads:
            thread.join(60.0)
        assert not self.wrong, self.wrong


@pytest.mark.parametrize("change", [lambda etcd: None, EtcdServer.forget], ids=["as it was", "without its memory"])
def test_no_request_fails_while_etcd_is_dead_nor_when_it_comes_back(
    hosts: Hosts, change: Callable[[EtcdServer], None]
) -> None:
    load = Load((hosts.near, hosts.far))
    load.wait(4)
    hosts.etcd.kill()
    try:
        threading.Event().wait(EXPIRY_S + 1)
        load.wait(4)
        change(hosts.etcd)
    finally:
        hosts.etcd.start()
    wait_until(lambda: len(hosts.near.all_records()) == 2, "both workers to register again", 30.0)
    load.wait(8)
    load.stop()


def test_requests_to_a_host_behind_a_slow_link_are_answered(hosts: Hosts) -> None:
    question = prompt() * 40
    hosts.network.slow_down(hosts.far.host, "256kbit")
    try:
        answers = [hosts.near.ask(text_input=question, max_tokens=100, ignore_eos=True) for _ in range(4)]
    finally:
        hosts.network.speed_up(hosts.far.host)
    assert [answer.token_ids for answer in answers] == [said(question, 100)] * 4
    assert hosts.worker(hosts.far) in {worker for answer in answers for worker in answer.last.worker_ids}


def test_stalls_and_resets_between_router_and_worker_lose_no_token(hosts: Hosts) -> None:
    questions = [prompt() for _ in range(6)]
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
