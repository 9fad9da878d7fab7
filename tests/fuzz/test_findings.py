"""What fuzzing has found, input by input: it is refused as the parser says, and never again by accident."""

from __future__ import annotations

import json
import math

import msgspec
import pytest

from fuzz.families import FAMILIES
from kelp.core.request_routing import PREFERRED_TAGS, REQUIRED_TAGS

_PARSERS = {parser.name: parser for family in FAMILIES.values() for parser in family.parsers}
_SURROGATE = '{"zone": "\\ud800"}'
_HTML = b"<html><body>a proxy's page<br></body></html>"


def _s3(status: int, headers: dict[str, str], body: bytes) -> bytes:
    return msgspec.msgpack.encode((status, headers, body))


def _request(**parameters: str) -> bytes:
    return msgspec.msgpack.encode(({"text_input": b"hi"}, parameters))


def _answer(names: list[str], contents: list[bytes]) -> bytes:
    """To a request, and nothing to a question after it: the first thing that is heard is what the request's was."""
    return msgspec.msgpack.encode([("r", names, contents, False, "")])


_JOIN = _PARSERS["join"].seeds[0]
FOUND: list[tuple[str, bytes, str]] = [
    ("authorization", b"Bearer sec\x9aret", "Unauthenticated"),
    (
        "a Struct over gRPC",
        json.dumps({"deadline_ms": math.inf}).encode(),
        "InvalidRequest: document",
    ),
    ("a Struct over gRPC", json.dumps({"reserve": math.nan}).encode(), "InvalidRequest: document"),
    ("request to the object store's process", b"\x82\xa7request\xa3ask\xa4ke\x80s\x90", "ProtocolError"),
    ("its answer", b"\x82\xa6answer\xa7refused\xa6reason\xa1\x83", "ProtocolError"),
    ("object store", _s3(200, {"content-type": "text/html"}, _HTML), "200 RetryableTransferError"),
    ("object store", _s3(200, {}, b""), "200 RetryableTransferError"),
    ("object store", _s3(200, {"content-length": "..0"}, b""), "200 RetryableTransferError"),
    (
        "object store",
        _s3(200, {"content-length": "1"}, b"<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>"),
        "200 int RetryableTransferError",
    ),
    *(("join", _JOIN.replace(b"\xa3cpu", device), "ProtocolError") for device in (b"\xa6cuda:x", b"\xa4cpu\n")),
    ("answers through Triton", _answer(["output_ids"], []), "ProtocolError"),
    ("answers through Triton", _answer([], [b"x"]), "ProtocolError"),
    ("answers through Triton", _answer(["output_ids"], [b"x" * 5]), "ProtocolError"),
    ("arena", b"kelp-kv-arena-1\0" + b"s" * 16 + b"\xff" * 32 + b"\0" * 4, "fresh"),
    ("manifest", b"[" * 100_000, "ours"),
    ("request", _request(**{REQUIRED_TAGS: _SURROGATE}), "InvalidRequest: kelp_require_tags.zone: "),
    ("request", _request(**{PREFERRED_TAGS: _SURROGATE}), "InvalidRequest: kelp_prefer_tags.zone: "),
]


@pytest.mark.parametrize(("name", "raw", "outcome"), FOUND, ids=[name for name, *_ in FOUND])
def test_an_input_that_was_a_finding_is_refused_as_it_should_be(name: str, raw: bytes, outcome: str) -> None:
    assert _PARSERS[name].outcome(raw).startswith(outcome)
