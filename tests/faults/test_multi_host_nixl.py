"""KV of the torch engine read by NIXL from one host to another, over a link that is slow and then cut."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_scenes import STORY, require_server

from kelp.core.peer_auth import make_token_file
from support.etcd_server import EtcdServer, why_no_etcd
from support.host_server import HostServer
from support.llm_client import Answer, Call
from support.net_hosts import Network, why_no_network
from support.waiting import wait_until

TCP_ONLY = ("env", "UCX_TLS=tcp,self")
"""Shared memory would cross from one namespace to the other, whatever the links are like."""
SETTINGS: dict[str, object] = {
    "executor.threads": 1,
    "handoff.lease_ttl_s": 4,
    "handoff.transfer_timeout_s": 6,
    "kv_manager.enabled": False,
    "registry.expiry_s": 2,
    "registry.heartbeat_s": 0.5,
    "router.disaggregation": "always",
    "router.policy": "round-robin",
}
NUM_TOKENS = 24


class Hosts(NamedTuple):
    """The near host prefills and decodes, the far one decodes."""

    network: Network
    near: HostServer
    far: HostServer

    def ask(self, decode_at: HostServer, salt: str) -> Answer:
        """A question whose answer is decoded there."""
        for number in range(10):
            answer = self.near.ask(**question(f"{salt} {number}"))
            if answer.last.worker_ids[-1] == f"{decode_at.grpc_endpoint}/decode":
                return answer
        raise AssertionError(f"nothing went to {decode_at.grpc_endpoint}")

    def stream_at_far(self) -> tuple[Call, list[int]]:
        """A stream whose KV the far host has begun to read, and the tokens that have come."""
        for number in range(10):
            call = self.near.open(**question(f"cut {number}"))
            tokens = call.next().token_ids
            if self.far.statuses()["decode"].num_running:
                return call, tokens
            call.cancel()
            self.near.wait_quiet()
        raise AssertionError("no stream went to the far host")


def question(salt: str) -> dict[str, object]:
    return {"text_input": STORY * 30, "max_tokens": NUM_TOKENS, "ignore_eos": True, "cache_salt": salt}


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hosts]:
    if not request.config.getoption("--soak", default=False):
        pytest.skip("takes a minute and a half: make soak (--soak)")
    require_server()
    if reason := why_no_etcd() or why_no_network():
        pytest.skip(reason)
    token = tmp_path / "token"
    make_token_file(token)
    with Network("near", "far") as network, EtcdServer(network.address, network.prefix) as etcd:
        settings = {**SETTINGS, "registry.url": f"etcd://{etcd.endpoint}/kelp", "peers.token_file": token}
        servers = [
            HostServer(
                network.hosts[name],
                settings,
                mode="disaggregated",
                prefix=TCP_ONLY,
                arguments=("--prefill", str(num_prefill), "--num-blocks", "256"),
            )
            for name, num_prefill in (("near", 1), ("far", 0))
        ]
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(HostServer.start, servers))
            yield Hosts(network, *servers)
            for server in servers:
                server.stop()
        finally:
            for server in servers:
                server.kill()


@pytest.mark.slow
def test_a_host_that_is_cut_off_while_it_reads_kv_costs_no_token_and_gives_its_blocks_back(hosts: Hosts) -> None:
    near = hosts.ask(hosts.near, "near")
    far = hosts.ask(hosts.far, "far")
    assert far.token_ids == near.token_ids
    assert far.last.worker_ids[0] == f"{hosts.near.grpc_endpoint}/prefill"
    hosts.network.slow_down(hosts.far.host, "20mbit")
    try:
        call, tokens = hosts.stream_at_far()
        with call:
            hosts.network.cut(hosts.far.host)
            rest = call.answer()
    finally:
        hosts.network.mend(hosts.far.host)
        hosts.network.speed_up(hosts.far.host)
    assert tokens + rest.token_ids == near.token_ids
    assert rest.last.worker_ids[-1] == f"{hosts.near.grpc_endpoint}/decode"
    wait_until(lambda: len(hosts.near.all_records()) == 3, "all workers", 30.0)
    assert hosts.ask(hosts.far, "after").token_ids == near.token_ids
    for server in (hosts.near, hosts.far):
        server.wait_quiet(60.0)
