"""The load generator against a server that answers as a test says: both protocols, and every way an answer is wrong."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from perf.router.loadgen import ClosedLoop, LoadResult, LoadSpec, decode_result, decode_spec, encode, run_load
from perf.router.loadgen_protocols import (
    GENERATE_STREAM,
    OPENAI_SSE,
    PROTOCOLS,
    AnswerError,
    Counts,
    dechunk,
    encode_request,
    events_of,
)
from perf.suite import BenchError

NUM_TOKENS = 3
TEXT = {
    OPENAI_SSE: [
        '{"choices":[{"delta":{"role":"assistant","content":""}}]}',
        '{"choices":[{"delta":{"content":"a"}}]}',
    ],
    GENERATE_STREAM: ['{"text_output":"","output_ids":[7]}', '{"text_output":"a","output_ids":[8]}'],
}
LAST = {
    OPENAI_SSE: '{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}',
    GENERATE_STREAM: '{"text_output":"b","num_input_tokens":5,"num_output_tokens":3}',
}


def chunk(data: str) -> bytes:
    return f"{len(data):x}\r\n{data}\r\n".encode()


def stream(events: list[str]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(chunk(f"data: {event}\n\n") for event in events) + b"0\r\n\r\n"


def whole_answer(protocol: str) -> bytes:
    return stream([*TEXT[protocol], LAST[protocol], *(["[DONE]"] if protocol == OPENAI_SSE else [])])


class Server:
    """Answers every request on every connection with the same bytes, cut into pieces of `piece_bytes`."""

    def __init__(self, answer: bytes, piece_bytes: int) -> None:
        self._answer = answer
        self._piece_bytes = piece_bytes
        self.bodies: list[dict[str, object]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as incoming:
            while line := incoming.readline():
                length = 0
                while line != b"\r\n":
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                    line = incoming.readline()
                self.bodies.append(json.loads(incoming.read(length)))
                if not self._answer:
                    return
                for start in range(0, len(self._answer), self._piece_bytes):
                    connection.sendall(self._answer[start : start + self._piece_bytes])


@contextmanager
def answering(answer: bytes, piece_bytes: int = 1 << 20) -> Iterator[Server]:
    server = Server(answer, piece_bytes)
    try:
        yield server
    finally:
        server.close()


def spec_for(server: Server, protocol: str, num_prompts: int = 5, concurrency: int = 2) -> LoadSpec:
    return LoadSpec(
        protocol=protocol,
        host="127.0.0.1",
        port=server.port,
        model="tiny",
        prompts=tuple(f"prompt {index}" for index in range(num_prompts)),
        max_tokens=NUM_TOKENS,
        concurrency=concurrency,
        is_quick_ack=True,
        timeout_s=5.0,
    )


@pytest.mark.parametrize("piece_bytes", [1 << 20, 7], ids=["at once", "in small pieces"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_prompt_is_sent_once_and_every_answer_is_read_to_its_end(protocol: str, piece_bytes: int) -> None:
    with answering(whole_answer(protocol), piece_bytes) as server:
        result = ClosedLoop(spec_for(server, protocol)).run()
    assert [answer.error for answer in result.answers] == [""] * 5
    assert {(answer.num_input_tokens, answer.num_output_tokens, answer.num_events) for answer in result.answers} == {
        (5, 3, 3)
    }
    assert all(answer.start_s < answer.first_s <= answer.end_s for answer in result.answers)
    asked = sorted(json.dumps(body["messages"]) for body in server.bodies)
    assert len(set(asked)) == 5


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_first_token_is_the_first_text_and_not_an_empty_event(protocol: str) -> None:
    first_text = PROTOCOLS[protocol].first_text
    assert first_text.search(TEXT[protocol][0].encode()) is None
    assert first_text.search(TEXT[protocol][1].encode()) is not None


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\noops", "oops"),
        (stream(['{"error":"[KELP_OVERLOADED] no"}']), "[KELP_OVERLOADED] no"),
        (stream(['{"text_output":"a"}', '{"num_input_tokens":5,"num_output_tokens":2}']), "2 of 3 tokens came"),
        (stream(['{"text_output":"","num_input_tokens":5,"num_output_tokens":3}']), "no event has text"),
        (b"", "the server closed the connection"),
    ],
    ids=["refused", "error event", "too few tokens", "no text", "closed"],
)
def test_an_answer_that_is_not_whole_is_an_error_and_says_why(answer: bytes, error: str) -> None:
    with answering(answer) as server:
        result = ClosedLoop(spec_for(server, GENERATE_STREAM, num_prompts=1, concurrency=1)).run()
    (got,) = result.answers
    assert error in got.error


def test_an_answer_of_the_openai_kind_without_usage_has_no_counts() -> None:
    with pytest.raises(AnswerError, match="no usage"):
        PROTOCOLS[OPENAI_SSE].counts([event.encode() for event in TEXT[OPENAI_SSE]])


def test_events_may_be_cut_anywhere_by_chunks() -> None:
    body = chunk('data: {"a"') + chunk(":1}\n\nda") + chunk("ta: [DONE]\n\n") + b"0\r\n\r\n"
    assert events_of(body) == [b'{"a":1}']


@pytest.mark.parametrize("body", [b"zz\r\nab\r\n0\r\n\r\n", b"ff\r\nab\r\n0\r\n\r\n"], ids=["no size", "cut short"])
def test_a_body_that_is_not_chunked_is_refused(body: bytes) -> None:
    with pytest.raises(AnswerError):
        dechunk(body)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_is_one_http_message_with_its_length(protocol: str) -> None:
    document = PROTOCOLS[protocol].document("tiny", "hello", NUM_TOKENS)
    head, _, body = encode_request(PROTOCOLS[protocol], "127.0.0.1", document).partition(b"\r\n\r\n")
    assert head.startswith(f"POST {PROTOCOLS[protocol].path} HTTP/1.1\r\n".encode())
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["max_tokens"] == NUM_TOKENS


def test_generate_stream_reports_the_counts_of_its_last_event() -> None:
    assert PROTOCOLS[GENERATE_STREAM].counts([LAST[GENERATE_STREAM].encode()]) == Counts(5, 3)


def test_specs_and_results_cross_the_pipe_unchanged() -> None:
    with answering(whole_answer(GENERATE_STREAM)) as server:
        spec = spec_for(server, GENERATE_STREAM, num_prompts=1, concurrency=1)
        result = ClosedLoop(spec).run()
    assert decode_spec(encode(spec)) == spec
    assert isinstance(result, LoadResult)
    assert decode_result(encode(result)) == result


def test_load_goes_to_loopback_addresses_only() -> None:
    with answering(b"") as server:
        spec = spec_for(server, OPENAI_SSE)
    with pytest.raises(BenchError, match="loopback"):
        run_load(LoadSpec(**{**{name: getattr(spec, name) for name in LoadSpec.__slots__}, "host": "192.0.2.1"}))
