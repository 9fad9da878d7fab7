"""The standalone router over real HTTP and gRPC connections."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc
import pytest
from api_rig import ApiRig, api_rig, worker
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from kelp.core.errors import ConfigError
from kelp.core.metrics import REQUESTS, Metrics
from kelp.router.api.auth import read_token
from kelp.router.api.exposition import Exposition
from kelp.router.api.rpc import SERVICE, rpc_name
from kelp.router.api.server import ListenOptions, Ports, RouterServer
from support.waiting import until

TOKEN = "a token of twenty-five characters"


class Idle:
    """Nothing runs in the background here."""

    def __init__(self) -> None:
        self.is_running = False

    async def start(self) -> None:
        self.is_running = True

    async def stop(self) -> None:
        self.is_running = False


def serve(use: Callable[[Ports], Awaitable[None]], token: str | None = TOKEN, rig: ApiRig | None = None) -> None:
    async def run() -> None:
        metrics = Metrics()
        metrics.add(REQUESTS, 2, outcome="ok")
        background = Idle()
        server = RouterServer((rig or api_rig()).operations, background, Exposition(metrics), period_s=0.01)
        stopping, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        serving = asyncio.ensure_future(server.run(ListenOptions("127.0.0.1", 0, 0, token), ready.set_result, stopping))
        try:
            await use(await ready)
        finally:
            stopping.set()
            await serving
        assert not background.is_running

    asyncio.run(run())


async def post(port: int, name: str, token: str | None = TOKEN, **document: Any) -> tuple[int, dict[str, Any]]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    url = f"http://127.0.0.1:{port}/v1/{name}"
    async with aiohttp.ClientSession() as session, session.post(url, json=document, headers=headers) as answer:
        return answer.status, await answer.json()


async def rpc(port: int, name: str, token: str | None = TOKEN, **document: Any) -> dict[str, Any]:
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(f"/{SERVICE}/{rpc_name(name)}", Struct.SerializeToString, Struct.FromString)
        request = json_format.ParseDict(document, Struct())
        return dict(json_format.MessageToDict(await call(request, metadata=metadata)))


def test_both_transports_reach_the_same_router() -> None:
    async def use(ports: Ports) -> None:
        status, _ = await post(ports.http, "register", worker=worker("one").model_dump(mode="json"))
        assert status == 200
        chosen = await rpc(ports.grpc, "select", request_id="r", token_ids=[1, 2, 3, 4], reserve=True)
        assert chosen["decode"]["worker_id"] == "host:1/one"
        await rpc(ports.grpc, "first_token", request_id="r", num_cached_tokens=0, prefill_s=0.25)
        status, explained = await post(ports.http, "explain", request_id="r")
        assert status == 200
        assert explained["outcome"]["prefill_s"] == 0.25

    serve(use)


def test_who_shows_no_token_or_another_one_is_turned_away() -> None:
    async def use(ports: Ports) -> None:
        for token in (None, "", "a token of another person altogether"):
            status, answer = await post(ports.http, "workers", token=token)
            assert status == 401
            assert answer["error"]["code"] == "KELP_UNAUTHENTICATED"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await rpc(ports.grpc, "workers", token=token)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

    serve(use)


def test_without_a_token_everybody_is_let_in() -> None:
    async def use(ports: Ports) -> None:
        assert await post(ports.http, "workers", token=None) == (200, {"workers": [], "managers": []})
        assert await rpc(ports.grpc, "workers", token=None) == {"workers": [], "managers": []}

    serve(use, token=None)


def test_errors_arrive_typed_on_both_transports() -> None:
    async def use(ports: Ports) -> None:
        status, answer = await post(ports.http, "select", request_id="r", token_ids=[1])
        assert (status, answer["error"]["code"]) == (503, "KELP_NO_WORKER")
        status, answer = await post(ports.http, "select", request_id="r", token_ids=[1], max_tokens=0)
        assert (status, answer["error"]["code"]) == (400, "KELP_INVALID_ARGUMENT")
        assert "max_tokens" in answer["error"]["message"]
        status, answer = await post(ports.http, "guess")
        assert status == 404
        with pytest.raises(grpc.aio.AioRpcError, match="KELP_NO_WORKER") as refused:
            await rpc(ports.grpc, "select", request_id="r", token_ids=[1])
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    serve(use)


def test_health_needs_no_token_and_metrics_are_prometheus_text() -> None:
    async def use(ports: Ports) -> None:
        base = f"http://127.0.0.1:{ports.http}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{base}/health") as answer:
                assert (answer.status, await answer.text()) == (200, "ok\n")
            async with session.get(f"{base}/metrics") as answer:
                assert answer.status == 401
            async with session.get(f"{base}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
                assert 'kelp_requests_total{outcome="ok"} 2.0' in (await answer.text()).splitlines()

    serve(use)


def test_a_body_beyond_the_limit_is_refused() -> None:
    async def use(ports: Ports) -> None:
        url = f"http://127.0.0.1:{ports.http}/v1/select"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        body = io.BytesIO(b" " * (5 * 1024 * 1024))
        async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as answer:
            assert answer.status == 413

    serve(use)


def test_a_port_in_use_is_named() -> None:
    async def use(ports: Ports) -> None:
        for options, option in (
            (ListenOptions("127.0.0.1", ports.http, 0, None), "--http-port"),
            (ListenOptions("127.0.0.1", 0, ports.grpc, None), "--grpc-port"),
        ):
            other = RouterServer(api_rig().operations, Idle(), Exposition(Metrics()))
            with pytest.raises(ConfigError, match=option):
                await other.run(options, lambda _: None, asyncio.Event())

    serve(use)


def test_a_token_file_must_hold_a_long_enough_token(tmp_path: Any) -> None:
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match="--token-file"):
        read_token(path)
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="at least 16"):
        read_token(path)
    path.write_text(f"{TOKEN}\n")
    assert read_token(path) == TOKEN


def test_an_idle_server_frees_what_its_callers_have_forgotten() -> None:
    rig = api_rig()
    rig.register(worker("one"))

    async def use(ports: Ports) -> None:
        await post(ports.http, "select", request_id="r", token_ids=[1, 2, 3, 4], reserve=True)
        assert rig.selector.load.active.any()
        rig.clock.advance(3600.0)
        await until(lambda: not rig.selector.load.active.any(), "the reservation to lapse")

    serve(use, rig=rig)
