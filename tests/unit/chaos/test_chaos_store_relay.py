"""A relay breaks what goes through it for a while, and is whole again."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import threading
from collections.abc import Iterator

import pytest

from kelp.chaos.faults import FaultKind
from kelp.chaos.store_relay import StoreRelay, object_bytes, spoiled
from kelp.supervisor.ports import pick_free
from support.waiting import until, wait_until

BODY = bytes(range(256)) * 256


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers every GET with the same body."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        return


class QuietServer(http.server.ThreadingHTTPServer):
    """Says nothing of clients that go."""

    def handle_error(self, *_: object) -> None:
        return


@pytest.fixture
def relay() -> Iterator[StoreRelay]:
    server = QuietServer(("127.0.0.1", 0), Answering)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    relay = StoreRelay("127.0.0.1", server.server_port, pick_free("127.0.0.1"))
    relay.start()
    yield relay
    relay.close()
    server.shutdown()
    server.server_close()
    serving.join()


def asked(relay: StoreRelay, timeout_s: float = 30.0) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(relay.endpoint.removeprefix("http://"), timeout=timeout_s)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def asked_in_the_end(relay: StoreRelay) -> tuple[int, bytes]:
    """It may listen a moment later."""
    found: list[tuple[int, bytes]] = []

    def has_answered() -> bool:
        with contextlib.suppress(OSError):
            found.append(asked(relay))
        return bool(found)

    wait_until(has_answered, "an answer", 30)
    return found[0]


def during(relay: StoreRelay, fault: FaultKind, timeout_s: float = 30.0) -> tuple[int, bytes] | type[OSError]:
    """What an answer is while the relay suffers, and that it is whole afterwards."""

    async def play() -> tuple[int, bytes] | type[OSError]:
        suffering = asyncio.ensure_future(relay.suffer(fault, 60.0))
        await until(lambda: relay.fault is fault, "the fault")
        try:
            found: tuple[int, bytes] | type[OSError] = await asyncio.to_thread(asked, relay, timeout_s)
        except (OSError, http.client.HTTPException):
            found = OSError
        suffering.cancel()
        await until(lambda: relay.fault is None, "the end of the fault")
        assert await asyncio.to_thread(asked_in_the_end, relay) == (200, BODY)
        return found

    return asyncio.run(play())


def test_an_undisturbed_relay_passes_everything_on(relay: StoreRelay) -> None:
    assert asked(relay) == (200, BODY)


def test_a_refusing_store_answers_503(relay: StoreRelay) -> None:
    assert during(relay, FaultKind.STORE_REFUSING) == (503, b"")


def test_a_store_that_is_gone_refuses_connections(relay: StoreRelay) -> None:
    assert during(relay, FaultKind.STORE_GONE) is OSError


def test_a_silent_store_says_nothing(relay: StoreRelay) -> None:
    assert during(relay, FaultKind.STORE_SILENT, timeout_s=0.05) is OSError


def test_a_slow_store_says_everything_in_the_end(relay: StoreRelay) -> None:
    assert during(relay, FaultKind.STORE_SLOW) == (200, BODY)


def test_a_store_that_lies_answers_as_much_but_not_the_same(relay: StoreRelay) -> None:
    found = during(relay, FaultKind.STORE_CORRUPT)
    assert isinstance(found, tuple)
    status, body = found
    assert status == 200
    assert len(body) == len(BODY)
    assert body != BODY
    assert relay.num_hit >= relay.num_spoiled > 0


@pytest.mark.parametrize(
    ("chunk", "was_object", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", False, (True, 3)),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\n", False, (True, 0)),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\n\r\n<List/>", True, (False, 0)),
        (b"abc", True, (True, 3)),
        (b"<List/>", False, (False, 0)),
    ],
)
def test_the_bytes_of_an_object_are_told_from_heads_and_listings(
    chunk: bytes, was_object: bool, expected: tuple[bool, int]
) -> None:
    assert object_bytes(chunk, was_object) == expected


def test_spoiling_changes_one_byte() -> None:
    assert spoiled(b"abc") == bytes([97, 98, 99 ^ 0xFF])
