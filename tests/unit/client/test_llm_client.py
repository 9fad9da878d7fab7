"""The client of `llm`, against a server that plays Triton."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kelp.client.grpc import LlmClient, LlmError, LlmResponse


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Says two tokens; then what the prompt asks for."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[str, bytes]] = {}
        self.has_seen_cancel = asyncio.Event()

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        request = await requests.__anext__()
        self.inputs = {
            tensor.name: (tensor.datatype, raw)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        prompt = self.inputs["text_input"][1][4:]
        for token in (5, 6):
            yield _answer(output_ids=np.array([token], "<i4").tobytes())
        if prompt == b"fail":
            yield service_pb2.ModelStreamInferResponse(error_message="in llm: [KELP_OVERLOADED] busy")
        elif prompt == b"dead":
            yield service_pb2.ModelStreamInferResponse(error_message="Stub process 'llm_0_0' is not healthy.")
        elif prompt == b"break":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "bye")
        elif prompt == b"wait":
            try:
                await asyncio.Event().wait()
            finally:
                self.has_seen_cancel.set()
        else:
            yield _answer(True, worker_ids=_bytes(b"a/prefill") + _bytes(b"a/decode"), finish_reason=_bytes(b"length"))


def _bytes(raw: bytes) -> bytes:
    return struct.pack("<I", len(raw)) + raw


def _answer(is_last: bool = False, **outputs: bytes) -> Any:
    response = service_pb2.ModelInferResponse(model_name="llm")
    for name, raw in outputs.items():
        response.outputs.add(name=name)
        response.raw_output_contents.append(raw)
    response.parameters["triton_final_response"].bool_param = is_last
    return service_pb2.ModelStreamInferResponse(infer_response=response)


async def _talk(prompt: str, take: int = 10, **fields: Any) -> tuple[Server, list[LlmResponse]]:
    service, server = Server(), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = LlmClient(f"127.0.0.1:{port}")
    responses: list[LlmResponse] = []
    try:
        stream = client.stream({"text_input": prompt, **fields}, "r")
        async for response in stream:
            responses.append(response)
            if len(responses) == take:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        if prompt == "wait":
            await asyncio.wait_for(service.has_seen_cancel.wait(), 20.0)
        return service, responses
    finally:
        await client.close()
        await server.stop(None)


def test_responses_come_with_tokens_and_the_last_one_with_the_summary() -> None:
    _, responses = asyncio.run(_talk("hello"))
    assert [response.token_ids for response in responses] == [[5], [6], []]
    assert [response.is_last for response in responses] == [False, False, True]
    assert responses[-1].worker_ids == ["a/prefill", "a/decode"]
    assert responses[-1].finish_reason == "length"
    assert responses[0].sequence_index == 0


def test_inputs_are_sent_as_they_are_declared() -> None:
    service, _ = asyncio.run(_talk("hello", max_tokens=3, temperature=1, random_seed=2**40, stop_words=["a", "b"]))
    assert service.inputs["max_tokens"] == ("INT32", struct.pack("<i", 3))
    assert service.inputs["temperature"] == ("FP32", struct.pack("<f", 1.0))
    assert service.inputs["random_seed"] == ("UINT64", struct.pack("<Q", 2**40))
    assert service.inputs["stop_words"] == ("BYTES", _bytes(b"a") + _bytes(b"b"))


def test_an_error_of_the_server_has_its_code() -> None:
    with pytest.raises(LlmError) as caught:
        asyncio.run(_talk("fail"))
    assert (caught.value.code, caught.value.is_connection) == ("OVERLOADED", False)


def test_a_call_that_breaks_is_known_as_such() -> None:
    with pytest.raises(LlmError) as caught:
        asyncio.run(_talk("break"))
    assert (caught.value.code, caught.value.is_connection) == ("UNAVAILABLE", True)


def test_a_server_without_a_router_has_said_nothing_about_the_request() -> None:
    with pytest.raises(LlmError) as caught:
        asyncio.run(_talk("dead"))
    assert (caught.value.code, caught.value.is_connection) == ("UNTYPED", True)


def test_who_goes_early_cancels() -> None:
    service, _ = asyncio.run(_talk("wait", take=2))
    assert service.has_seen_cancel.is_set()
