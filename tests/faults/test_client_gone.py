"""A client that goes, in every phase and over both protocols: nothing of its request stays anywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from fault_scenes import (
    GrpcClient,
    HttpClient,
    OpenRequest,
    busy_workers,
    long_request,
    short_request,
    wait_held_back,
    wait_prefilling,
    wait_queued,
    wait_reserved,
    wait_unqueued,
)

from support.serving import KelpServer, shm_regions

Connect = Callable[[KelpServer, dict[str, object]], OpenRequest]
over_both = pytest.mark.parametrize("connect", [GrpcClient, HttpClient], ids=["grpc", "http"])


def test_a_client_may_go_while_its_request_is_queued(server: KelpServer) -> None:
    with busy_workers(server):
        client = GrpcClient(server, short_request())
        wait_queued(server)
        client.leave()
        wait_unqueued(server)
        assert server.statuses()["decode"].num_running == 1, "the other request must not be touched"


def test_a_client_may_go_while_the_router_holds_its_request_back(server: KelpServer) -> None:
    with busy_workers(server), contextlib.closing(_Leaving(server)):
        wait_queued(server)
        client = GrpcClient(server, short_request())
        wait_held_back(server, 1)
        client.leave()
        wait_held_back(server, 0)
        assert server.statuses()["decode"].num_running == 1, "the other requests must not be touched"


def test_an_http_client_that_goes_while_queued_costs_one_response_at_most(server: KelpServer) -> None:
    with busy_workers(server):
        client = HttpClient(server, short_request())
        wait_queued(server)
        client.leave()


@over_both
def test_a_client_may_go_while_its_prompt_computes(server: KelpServer, connect: Connect) -> None:
    client = connect(server, long_request())
    wait_prefilling(server)
    client.leave()


@over_both
def test_a_client_may_go_while_kv_is_transferred(server: KelpServer, connect: Connect) -> None:
    client = connect(server, long_request())
    wait_reserved(server)
    client.leave()


@over_both
def test_a_client_may_go_while_tokens_stream(server: KelpServer, connect: Connect) -> None:
    client = connect(server, short_request())
    client.wait_tokens(3)
    client.leave()


def test_clients_that_go_at_any_time_leave_nothing_behind(server: KelpServer) -> None:
    regions = shm_regions(server.grpc_port)
    for num_tokens in (0, 0, 1, 2, 0, 3, 1, 0):
        with contextlib.closing(_Leaving(server)) as client:
            client.wait_tokens(num_tokens)
    server.wait_quiet()
    assert shm_regions(server.grpc_port) == regions


class _Leaving(GrpcClient):
    def __init__(self, server: KelpServer) -> None:
        super().__init__(server, short_request())

    def close(self) -> None:
        self.leave()
