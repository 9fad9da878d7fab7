"""The control channel to block managers, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kelp.client.base import WorkerAddress
from kelp.client.grpc import GrpcKvManagerClient
from kelp.core.errors import CapacityError, DeadlineExceeded, PeerRefused, ProtocolError, WorkerLost
from kelp.core.kv_manager_messages import (
    Clear,
    Done,
    GetStats,
    Join,
    Operation,
    Pin,
    Renew,
    Renewed,
    Stats,
    decode_operations,
    encode_batch,
)
from kelp.core.kv_manager_values import PoolRecord, SpaceRecord
from kelp.core.peer_auth import KV_OPERATIONS_PROOF, KV_RESULTS_PROOF, PeerToken, proof_in, seal, unseal

Answer = Callable[[list[Operation]], bytes]
TOKEN = PeerToken(b"t" * 16)
JOIN = Join("w", "e", SpaceRecord(1, 1, 16, 8, "float16", "m", 1), PoolRecord(b"agent", 4096, 1, 4096, 4096, "cpu"))


class ManagerDouble(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton that answers each batch as the test says."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.tokens: tuple[PeerToken | None, PeerToken | None] = (None, None)
        self.scope: tuple[str, ...] = ()
        self.batches: list[list[Operation]] = []
        self.is_silent = False
        self.error = ""

    async def serve(self, endpoint: str) -> int:
        """Listen there; the port."""
        self.server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        port = self.server.add_insecure_port(endpoint)
        await self.server.start()
        return int(port)

    async def ModelInfer(self, request, context):  # noqa: N802
        if self.is_silent:
            await asyncio.Event().wait()
        if self.error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self.error)
        asked = request.raw_input_contents[0][4:]
        operations = decode_operations(unseal(self.tokens[0], KV_OPERATIONS_PROOF, self.scope, asked))
        self.batches.append(operations)
        results = self._answer(operations)
        raw = seal(self.tokens[1], KV_RESULTS_PROOF, self.scope, results, proof_in(asked))
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="results", datatype="BYTES", shape=(1,))
        response.raw_output_contents.append(len(raw).to_bytes(4, "little") + raw)
        return response


def right(operations: list[Operation]) -> bytes:
    kinds = {GetStats: Stats({"a": 1.0}), Pin: Done(7), Clear: Done(3), Renew: Renewed((1,)), Join: Done(0)}
    return encode_batch([kinds[type(operation)] for operation in operations])


@contextlib.asynccontextmanager
async def rig(
    answer: Answer = right, token: PeerToken | None = None
) -> AsyncIterator[tuple[GrpcKvManagerClient, WorkerAddress, ManagerDouble]]:
    double = ManagerDouble(answer)
    port = await double.serve("127.0.0.1:0")
    client = GrpcKvManagerClient(token)
    double.scope = (f"127.0.0.1:{port}/kv_block_manager", "epoch" if token else "")
    try:
        yield client, WorkerAddress(f"127.0.0.1:{port}", "kv_block_manager", epoch=double.scope[1]), double
    finally:
        await client.close()
        await double.server.stop(None)


def test_quick_operations_that_come_together_travel_together_and_slow_ones_alone():
    async def scene():
        async with rig() as (client, address, double):
            calls = [
                client.call(address, [GetStats(), Pin((), 1.0)], 5.0),
                client.call(address, [Clear(None)], 5.0),
                client.call(address, [Renew("w", "e", (1,))], 5.0),
            ]
            assert await asyncio.gather(*calls) == [[Stats({"a": 1.0}), Done(7)], [Done(3)], [Renewed((1,))]]
            kinds = sorted([type(operation).__name__ for operation in batch] for batch in double.batches)
            assert kinds == [["Clear"], ["GetStats", "Pin", "Renew"]]

    asyncio.run(scene())


def test_whoever_joins_a_manager_that_is_back_is_not_turned_away_by_a_connection_that_still_waits():
    async def scene():
        async with rig() as (client, address, double):
            await client.call(address, [GetStats()], 5.0)
            for _ in range(3):
                await double.server.stop(None)
                for _ in range(20):
                    with pytest.raises(WorkerLost):
                        await client.call(address, [GetStats()], 5.0)
                await double.serve(address.endpoint)
                assert await client.call(address, [JOIN], 30.0) == [Done(0)]

    asyncio.run(scene())


@pytest.mark.parametrize("answered_with", [TOKEN, None, PeerToken(b"o" * 16)], ids=["it", "nothing", "another"])
def test_what_a_manager_answers_counts_if_it_knows_the_token(answered_with):
    async def scene():
        async with rig(token=TOKEN) as (client, address, double):
            double.tokens = (TOKEN, answered_with)
            asked = client.call(address, [Pin((), 1.0)], 5.0)
            if answered_with is TOKEN:
                assert await asked == [Done(7)]
            else:
                with pytest.raises(PeerRefused, match="kv results"):
                    await asked

    asyncio.run(scene())


def test_a_manager_that_is_gone_is_a_lost_worker():
    async def scene():
        async with rig() as (client, address, double):
            double.error = "Stub process 'kv_block_manager_0_0' is not healthy."
            with pytest.raises(WorkerLost, match="KV block manager .*not healthy"):
                await client.call(address, [GetStats()], 5.0)
            with pytest.raises(WorkerLost):
                await client.call(WorkerAddress("127.0.0.1:9", "kv_block_manager"), [GetStats()], 5.0)

    asyncio.run(scene())


def test_a_typed_error_stays_what_it_is():
    async def scene():
        async with rig() as (client, address, double):
            double.error = "in ensemble: [KELP_OVERLOADED] too much"
            with pytest.raises(CapacityError, match="too much"):
                await client.call(address, [GetStats()], 5.0)

    asyncio.run(scene())


def test_a_silent_manager_costs_the_time_limit_and_no_more():
    async def scene():
        async with rig() as (client, address, double):
            double.is_silent = True
            with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
                await client.call(address, [Clear(None)], 0.05)

    asyncio.run(scene())


@pytest.mark.parametrize("raw", [b"garbage", encode_batch([Done(1), Done(2)])])
def test_an_answer_that_makes_no_sense_is_refused(raw: bytes):
    async def scene():
        async with rig(lambda _: raw) as (client, address, _):
            with pytest.raises(ProtocolError):
                await client.call(address, [GetStats()], 5.0)

    asyncio.run(scene())


def test_closing_fails_what_is_under_way():
    async def scene():
        async with rig() as (client, address, double):
            double.is_silent = True
            call = asyncio.ensure_future(client.call(address, [Clear(None)], 30.0))
            await asyncio.sleep(0)
            await client.close()
            with pytest.raises(WorkerLost):
                await call

    asyncio.run(scene())
