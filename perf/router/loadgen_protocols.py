"""The two streaming protocols that the load generator speaks, as bytes: one request out, one answer in.

Both carry the same chat messages, so both servers render a template and tokenise. Knows no sockets.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Protocol as TypingProtocol

OPENAI_SSE = "openai-sse"
GENERATE_STREAM = "generate-stream"


class AnswerError(Exception):
    """An answer is not what was asked for; the message says how."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What an answer says of itself at its end."""

    num_input_tokens: int
    num_output_tokens: int


class Protocol(TypingProtocol):
    """One way to ask for a chat completion and to read its stream."""

    path: str
    first_text: re.Pattern[bytes]
    """Matches in the body as soon as it holds generated text."""

    def document(self, model: str, prompt: str, max_tokens: int) -> dict[str, object]:
        """The JSON body that asks for exactly `max_tokens` tokens."""

    def counts(self, events: list[bytes]) -> Counts:
        """Token counts of a complete answer.

        Raises:
            AnswerError: It has none, or it is an error.
        """


class OpenAiSse:
    """`/v1/chat/completions` with `stream`, as Dynamo's frontend serves it."""

    path = "/v1/chat/completions"
    first_text = re.compile(rb'"content":\s*"[^"]')

    def document(self, model: str, prompt: str, max_tokens: int) -> dict[str, object]:
        """See `Protocol`."""
        return {
            "model": model,
            "messages": _messages(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def counts(self, events: list[bytes]) -> Counts:
        """See `Protocol`."""
        for event in reversed(events):
            if b'"usage":{' in event:
                usage = _read(event)["usage"]
                return Counts(usage["prompt_tokens"], usage["completion_tokens"])
        raise AnswerError(f"no usage in {len(events)} events: {_last(events)}")


class GenerateStream:
    """Triton's `generate_stream` of the model `llm`; the messages are a JSON string there."""

    path = "/v2/models/llm/generate_stream"
    first_text = re.compile(rb'"text_output":\s*"[^"]')

    def document(self, model: str, prompt: str, max_tokens: int) -> dict[str, object]:
        """See `Protocol`."""
        return {
            "messages": json.dumps(_messages(prompt)),
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
        }

    def counts(self, events: list[bytes]) -> Counts:
        """See `Protocol`."""
        last = _read(events[-1]) if events else {}
        if "num_output_tokens" not in last:
            raise AnswerError(f"the last of {len(events)} events has no counts: {_last(events)}")
        return Counts(last["num_input_tokens"], last["num_output_tokens"])


PROTOCOLS: dict[str, Protocol] = {OPENAI_SSE: OpenAiSse(), GENERATE_STREAM: GenerateStream()}


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def encode_request(protocol: Protocol, host: str, document: dict[str, object]) -> bytes:
    """The HTTP/1.1 request."""
    body = json.dumps(document).encode()
    head = (
        f"POST {protocol.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Accept: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def events_of(chunked: bytes) -> list[bytes]:
    """The SSE events of a body in HTTP chunks, without `[DONE]`.

    Raises:
        AnswerError: The chunks are malformed.
    """
    events = [line[5:].strip() for line in dechunk(chunked).split(b"\n") if line.startswith(b"data:")]
    return [event for event in events if event != b"[DONE]"]


def dechunk(chunked: bytes) -> bytes:
    """The body inside HTTP/1.1 chunks.

    Raises:
        AnswerError: A chunk's size is none, or the body is too short.
    """
    parts, position = [], 0
    while True:
        end = chunked.find(b"\r\n", position)
        try:
            size = int(chunked[position:end], 16)
        except ValueError:
            raise AnswerError(
                f"byte {position} of the body begins no chunk: {chunked[position : position + 40]!r}"
            ) from None
        if size == 0:
            return b"".join(parts)
        start = end + 2
        position = start + size + 2
        if position > len(chunked):
            raise AnswerError(f"a chunk of {size} bytes is cut short")
        parts.append(chunked[start : start + size])


def _read(event: bytes) -> dict[str, object]:
    try:
        document = json.loads(event)
    except ValueError:
        raise AnswerError(f"not JSON: {event[:200]!r}") from None
    if not isinstance(document, dict) or "error" in document:
        raise AnswerError(event[:300].decode(errors="replace"))
    return document


def _last(events: list[bytes]) -> str:
    return events[-1][:300].decode(errors="replace") if events else "none"
