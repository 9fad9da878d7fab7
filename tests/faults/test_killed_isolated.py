"""Whole servers that die in the isolated layout: requests are answered, and the supervisor brings the server back."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psutil
import pytest
from fault_scenes import require_server
from kill_scenes import (
    FLEET_SETTINGS,
    check_serving,
    decoding,
    disturb_decoding,
    disturb_prefilling,
    prefilling,
    tritonserver_of,
    wait_back,
)

from support.llm_client import ServedError, http_post
from support.serving import KelpServer, shm_regions
from support.waiting import wait_until


@pytest.fixture(scope="module")
def fleet() -> Iterator[KelpServer]:
    """One prefill and two decode workers, each in a tritonserver of its own."""
    require_server()
    settings = {**FLEET_SETTINGS, "executor.threads": 1}
    with KelpServer(isolate=True, num_blocks=128, settings=settings, arguments=("--decode", "2")).start() as server:
        yield server


def test_a_prefill_server_killed_while_prefilling_is_done_without_and_comes_back(fleet: KelpServer) -> None:
    # First of all tests: once a few handoffs have been measured, the router may find that they do not pay here.
    expected = prefilling(fleet).undisturbed()
    epoch, regions = fleet.records()["prefill"].epoch, num_regions(fleet)
    answer = disturb_prefilling(fleet, lambda worker: tritonserver_of(fleet, worker).kill())
    assert answer.token_ids == expected.token_ids
    wait_back(fleet, "prefill", epoch)
    wait_until(lambda: is_prefilled_by_it(fleet), "traffic to it again", 30.0)
    check_serving(fleet)
    assert num_regions(fleet) == regions


def test_a_decode_server_killed_while_decoding_costs_no_token_and_comes_back(fleet: KelpServer) -> None:
    expected = decoding(fleet).undisturbed()
    epochs = {name: record.epoch for name, record in fleet.records().items()}
    regions = num_regions(fleet)
    killed: list[str] = []

    def kill(worker: str) -> None:
        killed.append(worker)
        tritonserver_of(fleet, worker).kill()

    answer = disturb_decoding(fleet, kill)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    wait_back(fleet, killed[0], epochs[killed[0]])
    check_serving(fleet)
    assert num_regions(fleet) == regions


def test_a_decode_server_that_gets_sigterm_while_decoding_costs_no_token_and_comes_back(fleet: KelpServer) -> None:
    expected = decoding(fleet).undisturbed()
    epochs = {name: record.epoch for name, record in fleet.records().items()}
    ended: list[str] = []

    def terminate(worker: str) -> None:
        ended.append(worker)
        tritonserver_of(fleet, worker).terminate()

    answer = disturb_decoding(fleet, terminate)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert not answer.last.worker_ids[-1].endswith(f"/{ended[0]}")
    wait_back(fleet, ended[0], epochs[ended[0]])
    check_serving(fleet)


def test_a_guided_answer_stays_on_its_way_when_its_decode_server_is_killed(fleet: KelpServer) -> None:
    guide = "([0-9]{2}, ){25}done"
    expected = decoding(fleet, guide).undisturbed()
    assert re.fullmatch(guide, expected.text)
    epochs = {name: record.epoch for name, record in fleet.records().items()}
    killed: list[str] = []

    def kill(worker: str) -> None:
        killed.append(worker)
        tritonserver_of(fleet, worker).kill()

    answer = disturb_decoding(fleet, kill, guide)
    assert answer.token_ids == expected.token_ids
    assert (answer.text, answer.last.finish_reason) == (expected.text, "stop")
    wait_back(fleet, killed[0], epochs[killed[0]])
    check_serving(fleet)


def test_a_decode_worker_that_hangs_is_left_for_another(fleet: KelpServer) -> None:
    expected = decoding(fleet).undisturbed()
    epochs = {name: record.epoch for name, record in fleet.records().items()}
    hung: dict[str, psutil.Process] = {}

    def suspend(worker: str) -> None:
        hung[worker] = tritonserver_of(fleet, worker)
        fleet.stub(worker).suspend()

    answer = disturb_decoding(fleet, suspend)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    ((worker, server),) = hung.items()
    # Waking the stub would bring its server down, too: Triton 2.51 aborts on one that it has found unhealthy.
    server.kill()
    wait_back(fleet, worker, epochs[worker])
    check_serving(fleet)


def test_a_dead_router_ends_its_streams_and_comes_back(fleet: KelpServer) -> None:
    with decoding(fleet).open() as call:
        call.next()
        fleet.stub("llm").kill()
        with pytest.raises(ServedError):
            call.answer()
    # Until it has been ended, the server without its router says that it is ready.
    wait_until(lambda: "kelp is back" in fleet.output, "another server", 90.0)
    check_serving(fleet)


def num_regions(server: KelpServer) -> int:
    """Shared-memory regions of all its servers."""
    return sum(len(shm_regions(port)) for port in server.tritonservers())


def is_prefilled_by_it(fleet: KelpServer) -> bool:
    """Asked for by name: left to itself, the router may find by now that a short prompt does not pay there."""
    body = {"text_input": "Far out at sea", "max_tokens": 4, "kelp_worker": "prefill"}
    status, answer = http_post(f"{fleet.http_url}/v2/models/llm/generate", body)
    return status == 200 and b"/prefill" in answer
