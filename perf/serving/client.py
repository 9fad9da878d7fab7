"""The load client: a process that reads a LoadSpec on stdin and writes a LoadResult on stdout.

It speaks raw gRPC and looks at nothing but token counts, because it shares the machine with the server. Each request
has a stream of its own, half-closed after the request, as a plain client would have.
"""

from __future__ import annotations

import asyncio
import gc
import struct
import sys
import time
from collections.abc import Iterator

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from perf.serving.load import Answer, LoadResult, LoadSpec, decode_spec, encode

_TOKEN_BYTES = 4
_CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 64 * 1024 * 1024)]


def _bytes_tensor(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw


def make_request(prompt: str, max_tokens: int, deadline_ms: int) -> service_pb2.ModelInferRequest:
    """A greedy, streaming request that does not end before `max_tokens`."""
    inputs = (
        ("text_input", "BYTES", _bytes_tensor(prompt)),
        ("max_tokens", "INT32", struct.pack("<i", max_tokens)),
        ("stream", "BOOL", b"\x01"),
        ("ignore_eos", "BOOL", b"\x01"),
        ("deadline_ms", "INT32", struct.pack("<i", deadline_ms)),
    )
    request = service_pb2.ModelInferRequest(model_name="llm")
    for name, datatype, raw in inputs:
        request.inputs.add(name=name, datatype=datatype, shape=[1])
        request.raw_input_contents.append(raw)
    return request


def read_outputs(response: service_pb2.ModelInferResponse) -> dict[str, bytes]:
    """Raw contents by tensor name."""
    return {output.name: raw for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)}


def split_strings(raw: bytes) -> tuple[str, ...]:
    """The elements of a BYTES tensor."""
    found, position = [], 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        found.append(raw[position : position + length].decode())
        position += length
    return tuple(found)


class Recorder:
    """Collects one answer."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._arrivals: list[tuple[float, int]] = []
        self._num_responses = 0
        self._last: dict[str, bytes] = {}

    def take(self, message: service_pb2.ModelStreamInferResponse) -> None:
        """Note one response.

        Raises:
            ValueError: It is an error message.
        """
        now_s = time.monotonic()
        if message.error_message:
            raise ValueError(message.error_message)
        outputs = read_outputs(message.infer_response)
        if not outputs:
            return
        self._num_responses += 1
        if tokens := len(outputs.get("output_ids", b"")) // _TOKEN_BYTES:
            self._arrivals.append((now_s, tokens))
        self._last = outputs

    def answer(self, max_tokens: int, error: str = "") -> Answer:
        """What was seen; too few tokens are an error."""
        raw_count = self._last.get("num_input_tokens", b"")
        answer = Answer(
            start_s=self._start_s,
            arrivals=tuple(self._arrivals),
            num_responses=self._num_responses,
            num_input_tokens=struct.unpack("<I", raw_count)[0] if raw_count else 0,
            worker_ids=split_strings(self._last.get("worker_ids", b"")),
            error=error,
        )
        if error or answer.num_tokens == max_tokens:
            return answer
        return self.answer(max_tokens, f"{answer.num_tokens} of {max_tokens} tokens came")


async def _ask(stub: service_pb2_grpc.GRPCInferenceServiceStub, spec: LoadSpec, prompt: str) -> Answer:
    request = make_request(prompt, spec.max_tokens, int(spec.timeout_s * 1000))
    recorder = Recorder()
    try:
        async for message in stub.ModelStreamInfer(iter([request]), timeout=spec.timeout_s):
            recorder.take(message)
    except grpc.RpcError as error:
        return recorder.answer(spec.max_tokens, f"{error.code().name}: {error.details()}")
    except ValueError as error:
        return recorder.answer(spec.max_tokens, str(error))
    return recorder.answer(spec.max_tokens)


async def run(spec: LoadSpec) -> LoadResult:
    """Send the load and wait for all of it."""
    answers: list[Answer] = []

    async def work(prompts: Iterator[str]) -> None:
        for prompt in prompts:
            answers.append(await _ask(stub, spec, prompt))

    async with grpc.aio.insecure_channel(spec.endpoint, options=_CHANNEL_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), timeout=spec.timeout_s)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        prompts = iter(spec.prompts)
        cpu_before_s = time.process_time()
        await asyncio.gather(*(work(prompts) for _ in range(spec.concurrency)))
        return LoadResult(tuple(answers), time.process_time() - cpu_before_s)


def main() -> None:
    spec = decode_spec(sys.stdin.read())
    # A collection in the middle of a burst would show up as somebody else's latency.
    gc.disable()
    print(encode(asyncio.run(run(spec))))


if __name__ == "__main__":
    main()
