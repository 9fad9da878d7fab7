"""One Triton request: inputs copied out, responses in order, exactly one FINAL."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from pb_double import Request

from kelp.core.errors import (
    CapacityError,
    DeadlineExceeded,
    InvalidRequest,
    KelpError,
    NotFound,
    NotSupported,
    RequestCancelled,
)
from kelp.core.exchange import as_kelp_error
from kelp_triton.exchange import Exchange


def test_inputs_are_copies_by_name() -> None:
    shared = np.array([1, 2], dtype=np.int32)
    inputs = Exchange(Request(input_ids=shared)).inputs()
    shared[0] = 9
    assert list(inputs["input_ids"]) == [1, 2]


@pytest.mark.parametrize(("given", "expected"), [(None, {}), ({"temperature": 0.5}, {"temperature": 0.5})])
def test_request_parameters_are_a_document_that_may_be_missing(
    given: dict[str, object] | None, expected: dict[str, object]
) -> None:
    assert Exchange(Request(given)).parameters() == expected


def test_responses_go_out_in_order_and_the_last_one_is_final() -> None:
    request = Request()
    exchange = Exchange(request)
    for number in range(3):
        exchange.send({"output_ids": np.array([number])}, is_final=number == 2)
    sent = [response.output_tensors()[0].as_numpy()[0] for response in request.sender.responses if response]
    assert sent == [0, 1, 2]
    assert request.sender.has_ended.is_set()


Ending = Callable[[Exchange], None]
ENDINGS: list[Ending] = [
    lambda exchange: exchange.send({}, is_final=True),
    lambda exchange: exchange.fail(RequestCancelled("gone")),
    lambda exchange: exchange.finish(),
]


@pytest.mark.parametrize("end", ENDINGS, ids=["sent", "failed", "finished"])
def test_nothing_touches_a_request_that_has_ended(end: Ending) -> None:
    request = Request()
    exchange = Exchange(request)
    end(exchange)
    request.sender.is_gone = True
    exchange.send({"output_ids": np.array([1])})
    exchange.fail(RequestCancelled("late"))
    exchange.finish()
    assert exchange.is_cancelled() is False
    assert len(request.sender.responses) == 1
    assert request.sender.misuses == []


def test_finishing_without_a_response_sends_an_empty_final() -> None:
    request = Request()
    Exchange(request).finish()
    assert request.sender.responses == [None]
    assert request.sender.has_ended.is_set()


def test_a_client_that_has_gone_is_seen() -> None:
    request = Request()
    exchange = Exchange(request)
    assert not exchange.is_cancelled()
    request.sender.is_gone = True
    assert exchange.is_cancelled()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("bad"), "INVALID_ARG"),
        (NotSupported("no"), "UNSUPPORTED"),
        (NotFound("none"), "NOT_FOUND"),
        (CapacityError("full"), "UNAVAILABLE"),
        (RequestCancelled("gone"), "CANCELLED"),
        (DeadlineExceeded("late"), "UNAVAILABLE"),
    ],
)
def test_a_typed_error_carries_its_code_and_its_one_token(error: KelpError, code: str) -> None:
    request = Request()
    Exchange(request).fail(error)
    assert request.sender.error.code == code
    assert request.sender.error.message() == f"[KELP_{error.code}] {error.text}"
    assert request.sender.has_ended.is_set()


def test_an_unexpected_error_is_an_internal_one_that_names_its_kind(caplog: pytest.LogCaptureFixture) -> None:
    error = as_kelp_error(ValueError("odd"))
    assert str(error) == "[KELP_INTERNAL] ValueError: odd"
    assert "ValueError: odd" in caplog.text, "the log has the traceback"


def test_a_typed_error_stays_what_it_is() -> None:
    error = CapacityError("full")
    assert as_kelp_error(error) is error


def test_threads_that_end_a_request_at_once_send_one_final() -> None:
    for _ in range(50):
        request = Request()
        exchange = Exchange(request)
        start = threading.Barrier(len(ENDINGS))

        def race(end: Ending, exchange: Exchange = exchange, start: threading.Barrier = start) -> None:
            start.wait()
            end(exchange)
            exchange.is_cancelled()

        racers = [threading.Thread(target=race, args=(end,)) for end in ENDINGS]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len(request.sender.responses) == 1
        assert request.sender.misuses == []
