"""More and fewer workers on a live server, without losing a request."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from mock_fleet_rig import explain, generate

from support.serving import KelpServer, run_cli
from support.waiting import wait_until

PROMPT = {"text_input": "One day the old lighthouse keeper", "max_tokens": 64, "ignore_eos": True}


@pytest.fixture(scope="module")
def scaled_server() -> Iterator[KelpServer]:
    with KelpServer(num_blocks=256).start() as server:
        yield server


def scale(server: KelpServer, target: str) -> None:
    done = run_cli("scale", target, "--grpc-port", str(server.grpc_port), timeout_s=200)
    assert done.returncode == 0, done.stderr + server.output


def decode_workers_of_eight_requests(server: KelpServer) -> set[str]:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.ask(**PROMPT, stream=True), range(8)))
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    return {answer.last.worker_ids[-1].rpartition("/")[2] for answer in answers}


def why(server: KelpServer, name: str) -> str:
    """The reason of a decision."""
    generate(server, id=name, **PROMPT)
    return str(explain(server, name)["reason"])


def test_traffic_reaches_an_added_worker_and_a_removed_one_drains_first(scaled_server: KelpServer) -> None:
    check_up_and_down(scaled_server)


def test_the_isolated_layout_scales_by_whole_servers() -> None:
    with KelpServer(isolate=True, num_blocks=256).start() as server:
        num_before = len(server.tritonservers())
        check_up_and_down(server)
        assert len(server.tritonservers()) == num_before


def check_up_and_down(scaled_server: KelpServer) -> None:
    undisturbed = scaled_server.ask(**PROMPT)
    assert set(scaled_server.records()) == {"prefill", "decode"}

    scale(scaled_server, "decode=2")
    both = {"decode", "decode_1"}
    wait_until(lambda: decode_workers_of_eight_requests(scaled_server) == both, "traffic on both", 60.0)

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(scaled_server.ask, **PROMPT, stream=True) for _ in range(8)]
        scale(scaled_server, "decode=1")
        answers = [stream.result() for stream in streams]
    assert {tuple(answer.token_ids) for answer in answers} == {tuple(undisturbed.token_ids)}
    assert set(scaled_server.records()) == {"prefill", "decode"}
    assert decode_workers_of_eight_requests(scaled_server) == {"decode"}
    scaled_server.wait_quiet()


def test_further_prefill_workers_can_come_and_all_can_go(scaled_server: KelpServer) -> None:
    scale(scaled_server, "prefill=2")
    assert set(scaled_server.records()) == {"prefill", "prefill_1", "decode"}
    scale(scaled_server, "prefill=0")
    assert set(scaled_server.records()) == {"decode"}
    assert decode_workers_of_eight_requests(scaled_server) == {"decode"}
    assert why(scaled_server, "without prefill workers") == "aggregated"
    scale(scaled_server, "prefill=1")
    # Whether it then pays to use it is another question.
    reasons = {"disaggregated", "aggregated: predicted to be faster"}
    wait_until(lambda: why(scaled_server, "with one") in reasons, "the router to see it")


def test_a_worker_whose_requests_were_cancelled_can_still_be_unloaded(scaled_server: KelpServer) -> None:
    # Triton 2.51 keeps a reference to a model for ever when a cancelled gRPC call meets a response on its way.
    scale(scaled_server, "decode=2")
    worker = scaled_server.stub("decode_1")
    for _ in range(60):
        with scaled_server.open(**PROMPT) as call:
            assert call.next().token_ids
    scaled_server.wait_quiet()
    scale(scaled_server, "decode=1")
    wait_until(lambda: not worker.is_running(), "the end of decode_1's process")


@pytest.mark.parametrize("target", ["decode=0", "encode=2", "decode", "decode=two"])
def test_a_target_that_makes_no_sense_is_refused_in_one_line(scaled_server: KelpServer, target: str) -> None:
    done = run_cli("scale", target, "--grpc-port", str(scaled_server.grpc_port))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_draining_an_unknown_worker_names_the_running_ones(scaled_server: KelpServer) -> None:
    done = run_cli("drain", "decode_7", "--grpc-port", str(scaled_server.grpc_port))
    assert done.returncode == 2
    assert "decode_7" in done.stderr
    assert "prefill" in done.stderr


def test_a_drained_worker_gets_no_more_requests(scaled_server: KelpServer) -> None:
    scale(scaled_server, "decode=2")
    done = run_cli("drain", "decode_1", "--grpc-port", str(scaled_server.grpc_port))
    assert done.returncode == 0, done.stderr
    assert "decode_1: draining, 0 requests, 0 leases" in done.stdout
    assert decode_workers_of_eight_requests(scaled_server) == {"decode"}
