"""Errors: one token each, found again behind whatever Triton puts in front."""

import pytest

from kelp.core.errors import InternalError, KelpError, WorkerLost, error_types, from_message


@pytest.mark.parametrize("error_type", error_types().values(), ids=lambda error_type: error_type.code)
def test_every_error_survives_the_wire_with_its_type_and_text(error_type):
    error = error_type("temperature: -1 is below the limit 0")
    returned = from_message(f"in ensemble 'x', {error}")
    assert type(returned) is error_type
    assert returned.text == error.text


@pytest.mark.parametrize("error_type", error_types().values(), ids=lambda error_type: error_type.code)
def test_a_message_has_exactly_one_token_even_around_another_error(error_type):
    nested = error_type(f"attempt failed: {WorkerLost('gone')}")
    assert str(nested).count("[KELP_") == 1
    assert str(nested).startswith(f"[KELP_{error_type.code}]")


@pytest.mark.parametrize("text", ["Socket closed", "[KELP_NO_SUCH_CODE] x", ""])
def test_text_without_a_known_token_reads_as_a_lost_worker(text):
    assert type(from_message(text)) is WorkerLost


def test_codes_are_unique_within_the_hierarchy():
    codes = [error_type.code for error_type in error_types().values()]
    assert len(codes) == len(set(codes))


def test_an_endless_message_is_cut():
    assert len(str(InternalError("x" * 100_000))) < 2100


def test_every_error_maps_to_triton_grpc_and_http():
    import grpc

    triton_codes = {"UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "CANCELLED"}
    for error_type in error_types().values():
        assert issubclass(error_type, KelpError)
        assert hasattr(grpc.StatusCode, error_type.grpc_status)
        assert error_type.triton_code in triton_codes
        assert 400 <= error_type.http_status < 600
