"""Router records beside the workers' in one directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelp.core.clock import FakeClock
from kelp.registry.base import RouterRecord
from kelp.registry.directory import DirectoryRegistry, RouterDirectory

EXPIRY_S = 5.0


def record(name: str = "llm_0_0", epoch: int = 1) -> RouterRecord:
    return RouterRecord(router_id=f"host:8001/{name}", epoch=epoch, loads_endpoint="host:1", answers_endpoint="host:2")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def routers(tmp_path: Path, clock: FakeClock) -> RouterDirectory:
    return RouterDirectory(tmp_path, EXPIRY_S, clock)


def test_a_router_is_found_until_it_withdraws(routers: RouterDirectory, clock: FakeClock) -> None:
    routers.publish(record())
    assert routers.snapshot() == [record().model_copy(update={"heartbeat_ns": clock.wall_ns()})]
    routers.withdraw(record().router_id, 1)
    assert routers.snapshot() == []


def test_an_earlier_incarnation_does_not_replace_a_later_one_that_lives(
    routers: RouterDirectory, clock: FakeClock
) -> None:
    routers.publish(record(epoch=2))
    routers.publish(record(epoch=1))
    assert [found.epoch for found in routers.snapshot()] == [2]
    clock.advance(EXPIRY_S + 1)
    routers.publish(record(epoch=1))
    assert [found.epoch for found in routers.snapshot()] == [1]


def test_an_earlier_incarnation_does_not_withdraw_a_later_one(routers: RouterDirectory) -> None:
    routers.publish(record(epoch=2))
    routers.withdraw(record().router_id, 1)
    assert [found.epoch for found in routers.snapshot()] == [2]


def test_a_router_that_stops_renewing_is_dead_and_swept(routers: RouterDirectory, clock: FakeClock) -> None:
    routers.publish(record())
    clock.advance(EXPIRY_S + 1)
    assert routers.snapshot() == []
    assert routers.sweep() == 1


def test_workers_and_routers_in_one_folder_do_not_see_each_other(
    tmp_path: Path, routers: RouterDirectory, clock: FakeClock
) -> None:
    routers.publish(record())
    workers = DirectoryRegistry(tmp_path, EXPIRY_S, clock)
    assert workers.snapshot() == []
    assert workers.sweep() == 0
    assert len(routers.snapshot()) == 1
