"""Faults of the router, its server and the registry, one after the other."""

from __future__ import annotations

import asyncio

import pytest

from kelp.chaos import front as front_module
from kelp.chaos.done import Victimless
from kelp.chaos.front import Front


def test_whoever_waits_for_the_front_gets_it_after_the_other_is_done() -> None:
    """Both have seen it whole for long enough when the first one takes it."""
    running: list[str] = []
    most = 0

    async def fault(front: Front, name: str) -> None:
        nonlocal most
        async with front.turn():
            running.append(name)
            most = max(most, len(running))
            await asyncio.sleep(0.5)
            running.remove(name)

    async def scenario() -> None:
        front = Front(lambda: True, serving_s=0.1)
        await asyncio.gather(*(fault(front, name) for name in ("router reloaded", "registry gone", "router killed")))

    asyncio.run(scenario())
    assert most == 1


def test_a_front_that_does_not_come_back_is_no_victim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "_LONGEST_WAIT_S", 0.5)

    async def scenario() -> None:
        async with Front(lambda: False, serving_s=0.1).turn():
            pytest.fail("nobody has been served")

    with pytest.raises(Victimless, match="has not been back"):
        asyncio.run(scenario())


def test_a_fault_that_fails_lets_go_of_the_front() -> None:
    async def scenario() -> None:
        front = Front(lambda: True, serving_s=0.1)
        with pytest.raises(OSError, match="no such thing"):
            async with front.turn():
                raise OSError("no such thing")
        async with front.turn():
            pass

    asyncio.run(scenario())
