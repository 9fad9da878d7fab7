"""Clients written for others work unchanged: stock tritonclient, curl, vLLM backend, TensorRT-LLM backend."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from hf_reference import Expected
from prompts import MAX_TOKENS, PROMPTS

from support.llm_client import http_post, sse_events
from support.serving import HOST, KelpServer

CAPITAL = PROMPTS["capital"]["text_input"]
PERF_ANALYZER = Path(sys.executable).with_name("perf_analyzer")


def test_a_stock_grpc_stream_client_gets_token_after_token(server: KelpServer, expected: dict[str, Expected]) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = tritonclient.grpc.InferenceServerClient(server.grpc_endpoint)
    client.start_stream(lambda result, error: answers.put((result, error)))
    prompt = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([CAPITAL.encode()], dtype=np.object_))
    stream = tritonclient.grpc.InferInput("stream", [1], "BOOL")
    stream.set_data_from_numpy(np.array([True]))
    limit = tritonclient.grpc.InferInput("max_tokens", [1], "INT32")
    limit.set_data_from_numpy(np.array([MAX_TOKENS], dtype=np.int32))
    client.async_stream_infer("llm", [prompt, stream, limit], request_id="seven", enable_empty_final_response=True)
    texts = []
    while True:
        result, error = answers.get(timeout=60)
        assert error is None
        response = result.get_response()
        assert response.id == "seven"
        texts.append(result.as_numpy("text_output")[0].decode())
        if response.parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    client.close()
    assert len(texts) > 1
    assert "".join(texts) == expected["capital"].text


def test_several_requests_share_one_stock_stream(server: KelpServer, expected: dict[str, Expected]) -> None:
    names = ("capital", "german", "chat")
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = tritonclient.grpc.InferenceServerClient(server.grpc_endpoint)
    client.start_stream(lambda result, error: answers.put((result, error)))
    for name in names:
        [(field, text)] = PROMPTS[name].items()
        prompt = tritonclient.grpc.InferInput(field, [1], "BYTES")
        prompt.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
        limit = tritonclient.grpc.InferInput("max_tokens", [1], "INT32")
        limit.set_data_from_numpy(np.array([MAX_TOKENS], dtype=np.int32))
        client.async_stream_infer("llm", [prompt, limit], request_id=name)
    found = {}
    for _ in names:
        result, error = answers.get(timeout=60)
        assert error is None
        found[result.get_response().id] = result.as_numpy("text_output")[0].decode()
    client.stop_stream()
    client.close()
    assert found == {name: expected[name].text for name in names}


def test_curl_s_generate_gets_one_json_document(server: KelpServer, expected: dict[str, Expected]) -> None:
    status, body = http_post(
        f"{server.http_url}/v2/models/llm/generate", {"text_input": CAPITAL, "max_tokens": MAX_TOKENS}
    )
    assert status == 200
    document = json.loads(body)
    assert document["model_name"] == "llm"
    assert document["text_output"] == expected["capital"].text
    assert document["output_ids"] == expected["capital"].token_ids
    assert document["finish_reason"] == "length"
    assert document["num_input_tokens"] == len(expected["capital"].prompt_ids)
    assert document["num_output_tokens"] == MAX_TOKENS


def test_generate_renders_a_chat(server: KelpServer, expected: dict[str, Expected]) -> None:
    status, body = http_post(f"{server.http_url}/v2/models/llm/generate", {**PROMPTS["chat"], "max_tokens": MAX_TOKENS})
    assert status == 200
    assert json.loads(body)["text_output"] == expected["chat"].text


def test_curl_s_generate_stream_gets_server_sent_events_as_they_come(
    server: KelpServer, expected: dict[str, Expected]
) -> None:
    connection = http.client.HTTPConnection(HOST, server.http_port, timeout=60)
    body = json.dumps({"text_input": CAPITAL, "max_tokens": MAX_TOKENS, "stream": True})
    connection.request("POST", "/v2/models/llm/generate_stream", body)
    reply = connection.getresponse()
    assert reply.status == 200
    assert reply.getheader("Content-Type", "").startswith("text/event-stream")
    first = reply.readline()
    rest = reply.read()
    connection.close()
    events = sse_events(first + rest)
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == expected["capital"].text
    assert [event["finish_reason"] for event in events] == ["", *[""] * (len(events) - 2), "length"]


class VllmClient:
    """Builds the requests of a client of Triton's vLLM backend: tensors and request parameters alike."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def run(self, prompts: list[str], is_streaming: bool, sampling: dict[str, str]) -> dict[str, list[str]]:
        """Texts of all responses by request id; all requests share one stream."""
        return asyncio.run(self._run(prompts, is_streaming, sampling))

    async def _run(self, prompts: list[str], is_streaming: bool, sampling: dict[str, str]) -> dict[str, list[str]]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            for number, prompt in enumerate(prompts):
                yield self._request(str(number), prompt, is_streaming, sampling)

        texts: dict[str, list[str]] = {str(number): [] for number in range(len(prompts))}
        async with tritonclient.grpc.aio.InferenceServerClient(self._endpoint) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None, error
                texts[result.get_response().id] += [text.decode() for text in result.as_numpy("text_output")]
        return texts

    def _request(self, request_id: str, prompt: str, is_streaming: bool, sampling: dict[str, str]) -> dict[str, Any]:
        tensors = {
            "text_input": np.array([prompt.encode()], dtype=np.object_),
            "stream": np.array([is_streaming], dtype=bool),
            "sampling_parameters": np.array([json.dumps(sampling).encode()], dtype=np.object_),
            "exclude_input_in_output": np.array([True], dtype=bool),
        }
        inputs = []
        for name, array in tensors.items():
            inputs.append(tritonclient.grpc.aio.InferInput(name, [1], "BOOL" if array.dtype == bool else "BYTES"))
            inputs[-1].set_data_from_numpy(array)
        return {
            "model_name": "llm",
            "inputs": inputs,
            "outputs": [tritonclient.grpc.aio.InferRequestedOutput("text_output")],
            "request_id": request_id,
            "parameters": sampling,
        }


@pytest.mark.parametrize("is_streaming", [True, False], ids=["streaming", "whole"])
def test_a_vllm_backend_client_works_unchanged(
    server: KelpServer, expected: dict[str, Expected], is_streaming: bool
) -> None:
    names = ("capital", "counting", "chinese")
    prompts = [PROMPTS[name]["text_input"] for name in names]
    sampling = {"temperature": "0", "top_p": "0.95", "max_tokens": str(MAX_TOKENS)}
    texts = VllmClient(server.grpc_endpoint).run(prompts, is_streaming, sampling)
    for number, name in enumerate(names):
        assert "".join(texts[str(number)]) == expected[name].text, name
        assert (len(texts[str(number)]) > 1) == is_streaming


def test_a_vllm_backend_client_s_sampling_is_obeyed(server: KelpServer) -> None:
    sampling = {"temperature": "0.9", "top_p": "0.95", "max_tokens": "12", "seed": "3", "early_stopping": "False"}
    client = VllmClient(server.grpc_endpoint)
    first, second = (client.run([CAPITAL], True, sampling)["0"] for _ in range(2))
    other = client.run([CAPITAL], True, {**sampling, "seed": "4"})["0"]
    assert "".join(first) == "".join(second) != "".join(other)


def test_a_vllm_backend_http_client_sends_parameters(server: KelpServer, expected: dict[str, Expected]) -> None:
    body = {"text_input": CAPITAL, "parameters": {"stream": False, "temperature": 0, "max_tokens": MAX_TOKENS}}
    status, reply = http_post(f"{server.http_url}/v2/models/llm/generate", body)
    assert status == 200, reply
    assert json.loads(reply)["text_output"] == expected["capital"].text


@pytest.mark.parametrize("extra", [{}, {"pad_id": 2, "end_id": 2}, {"stream": False}], ids=["plain", "ids", "stream"])
def test_a_tensorrt_llm_http_client_works_unchanged(
    server: KelpServer, expected: dict[str, Expected], extra: dict[str, Any]
) -> None:
    body = {"text_input": CAPITAL, "max_tokens": MAX_TOKENS, "bad_words": "", "stop_words": "", **extra}
    status, reply = http_post(f"{server.http_url}/v2/models/llm/generate", body)
    assert status == 200, reply
    assert json.loads(reply)["text_output"] == expected["capital"].text


def test_a_tensorrt_llm_http_client_streams(server: KelpServer, expected: dict[str, Expected]) -> None:
    body = {"text_input": CAPITAL, "max_tokens": MAX_TOKENS, "bad_words": "", "stop_words": "", "stream": True}
    status, reply = http_post(f"{server.http_url}/v2/models/llm/generate_stream", body)
    assert status == 200, reply
    events = sse_events(reply)
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == expected["capital"].text


def test_perf_analyzer_measures_streaming_requests(server: KelpServer, tmp_path: Path) -> None:
    if not PERF_ANALYZER.is_file():
        pytest.skip("no .venv/bin/perf_analyzer (make perf-analyzer)")
    row = {"text_input": [CAPITAL], "max_tokens": [4], "stream": [True]}
    (tmp_path / "in.json").write_text(json.dumps({"data": [row]}))
    exported = tmp_path / "out.json"
    command = [
        *(str(PERF_ANALYZER), "-m", "llm", "-i", "grpc", "-u", server.grpc_endpoint, "--streaming"),
        *("--input-data", str(tmp_path / "in.json"), "--concurrency-range", "2", "--request-count", "10"),
        *(f"--shape={name}:1" for name in row),
        *("--profile-export-file", str(exported)),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert exported.is_file(), finished.stdout + finished.stderr
    experiment = json.loads(exported.read_text())["experiments"][0]
    requests = experiment["requests"]
    assert len(requests) >= 10, finished.stdout + finished.stderr
    assert all(request.get("success", True) for request in requests)
    assert all(1 <= len(request["response_timestamps"]) <= 5 for request in requests), (
        "at most one a token, and the end"
    )
