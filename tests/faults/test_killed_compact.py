"""Stubs that die in the compact layout, where Triton never restarts them, nor anybody else here: the rest serves on.

The tests of this file share one server and leave it with fewer workers each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from fault_scenes import require_server
from kill_scenes import (
    FLEET_SETTINGS,
    check_serving,
    decoding,
    disturb_decoding,
    disturb_prefilling,
    disturb_transfer,
    prefilling,
    wait_forgotten,
    wait_worker,
)

from kelp.client.grpc import TritonControl
from support.llm_client import ServedError
from support.serving import KelpServer


@pytest.fixture(scope="module")
def fleet() -> Iterator[KelpServer]:
    """Two prefill and two decode workers in one tritonserver."""
    require_server()
    settings = {**FLEET_SETTINGS, "supervision.enabled": False, "router.recovery_wait_s": 3.0}
    arguments = ("--prefill", "2", "--decode", "2")
    with KelpServer(num_blocks=128, settings=settings, arguments=arguments).start() as server:
        yield server


def test_a_prefill_worker_killed_while_kv_is_transferred_is_replaced_by_another_one(fleet: KelpServer) -> None:
    # First of all tests: once a few handoffs have been measured, the router may find that they do not pay here.
    expected = prefilling(fleet).undisturbed()
    killed: list[str] = []

    def kill(worker: str) -> None:
        killed.append(worker)
        fleet.stub(worker).kill()

    answer = disturb_transfer(fleet, kill)
    assert answer.token_ids == expected.token_ids
    ((other,),) = [{"prefill", "prefill_1"} - set(killed)]
    assert answer.last.worker_ids[0].endswith(f"/{other}")
    wait_forgotten(fleet, killed[0])
    check_serving(fleet)


def test_a_prefill_worker_killed_while_prefilling_is_replaced_by_aggregated_serving(fleet: KelpServer) -> None:
    killed: list[str] = []

    def kill(worker: str) -> None:
        killed.append(worker)
        fleet.stub(worker).kill()

    expected = prefilling(fleet).undisturbed()
    answer = disturb_prefilling(fleet, kill)
    assert answer.token_ids == expected.token_ids
    assert len(answer.last.worker_ids) == 1
    wait_forgotten(fleet, killed[0])
    assert len(check_serving(fleet).last.worker_ids) == 1


def test_a_worker_unloaded_undrained_while_decoding_costs_no_token_and_may_be_loaded_again(fleet: KelpServer) -> None:
    expected = decoding(fleet).undisturbed()
    unloaded: list[str] = []
    with contextlib.closing(TritonControl(fleet.grpc_endpoint)) as control:
        configs = {name: control.config_of(name) for name in fleet.records()}

        def unload(worker: str) -> None:
            unloaded.append(worker)
            control.unload(worker)

        answer = disturb_decoding(fleet, unload)
        assert answer.token_ids == expected.token_ids
        assert answer.text == expected.text
        assert not answer.last.worker_ids[-1].endswith(f"/{unloaded[0]}")
        wait_forgotten(fleet, unloaded[0])
        control.load(unloaded[0], configs[unloaded[0]])
    wait_worker(fleet, "the worker", lambda name, _: name == unloaded[0])
    check_serving(fleet)


def test_a_decode_worker_killed_while_decoding_costs_no_token(fleet: KelpServer) -> None:
    expected = decoding(fleet).undisturbed()
    killed: list[str] = []

    def kill(worker: str) -> None:
        killed.append(worker)
        fleet.stub(worker).kill()

    answer = disturb_decoding(fleet, kill)
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
    assert not answer.last.worker_ids[-1].endswith(f"/{killed[0]}")
    wait_forgotten(fleet, killed[0])
    check_serving(fleet)


def test_when_no_worker_is_left_the_client_hears_so_before_its_deadline(fleet: KelpServer) -> None:
    for worker in list(fleet.records()):
        fleet.stub(worker).kill()
    with pytest.raises(ServedError) as raised:
        fleet.ask(**{"text_input": "Is anybody there?", "deadline_ms": 60_000})
    # It waits for one to come back, which nobody does here.
    assert raised.value.code in ("WORKER_LOST", "NO_WORKER")
