"""What the load client sends and what it makes of responses, without a server."""

from __future__ import annotations

import struct

import pytest
from perf.serving.client import Recorder, make_request, split_strings
from tritonclient.grpc import service_pb2

from kelp.core.schema_inputs import LLM_INPUTS_BY_NAME


def response(**outputs: bytes) -> service_pb2.ModelStreamInferResponse:
    message = service_pb2.ModelStreamInferResponse()
    for name, raw in outputs.items():
        message.infer_response.outputs.add(name=name)
        message.infer_response.raw_output_contents.append(raw)
    return message


def tokens(count: int) -> bytes:
    return struct.pack(f"<{count}i", *range(count))


def strings(*texts: str) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text.encode() for text in texts)


def test_every_input_that_is_sent_is_one_of_the_model_with_its_type():
    request = make_request("hello", 64, 1000)
    for tensor in request.inputs:
        assert LLM_INPUTS_BY_NAME[tensor.name].datatype.value == tensor.datatype
    assert len(request.inputs) == len(request.raw_input_contents)


def test_the_prompt_is_sent_as_one_string():
    request = make_request("héllo", 64, 1000)
    names = [tensor.name for tensor in request.inputs]
    assert split_strings(request.raw_input_contents[names.index("text_input")]) == ("héllo",)


def test_tokens_are_counted_by_response():
    recorder = Recorder()
    recorder.take(response(text_output=strings("a"), output_ids=tokens(1)))
    recorder.take(response(text_output=strings("b c"), output_ids=tokens(2)))
    answer = recorder.answer(max_tokens=3)
    assert [count for _, count in answer.arrivals] == [1, 2]
    assert (answer.num_responses, answer.error) == (2, "")


def test_the_last_response_tells_the_prompt_length_and_the_workers():
    recorder = Recorder()
    recorder.take(
        response(
            output_ids=tokens(1),
            num_input_tokens=struct.pack("<I", 129),
            worker_ids=strings("prefill:a", "decode:b"),
        )
    )
    answer = recorder.answer(max_tokens=1)
    assert (answer.num_input_tokens, answer.worker_ids) == (129, ("prefill:a", "decode:b"))


def test_the_empty_response_that_ends_a_stream_is_not_counted():
    recorder = Recorder()
    recorder.take(response(output_ids=tokens(1), num_input_tokens=struct.pack("<I", 5)))
    recorder.take(response())
    assert recorder.answer(max_tokens=1).num_responses == 1
    assert recorder.answer(max_tokens=1).num_input_tokens == 5


def test_an_error_message_ends_the_answer():
    message = service_pb2.ModelStreamInferResponse(error_message="[KELP_OVERLOADED] full")
    with pytest.raises(ValueError, match="KELP_OVERLOADED"):
        Recorder().take(message)


def test_an_answer_with_too_few_tokens_is_an_error():
    recorder = Recorder()
    recorder.take(response(output_ids=tokens(2)))
    assert recorder.answer(max_tokens=4).error == "2 of 4 tokens came"
