"""Corruption counts as done only where somebody has read it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kelp.chaos import tier_faults
from kelp.chaos.done import Victimless
from kelp.chaos.faults import Fault, FaultKind
from kelp.chaos.questions import Questions
from kelp.chaos.tier_faults import TierFaults
from kelp.core.types import Tier

ON_DISK, IN_STORE = Fault(1.0, FaultKind.BLOCK_CORRUPTED), Fault(1.0, FaultKind.STORE_CORRUPT, lasts_s=3.0)


class Fleet:
    """A fleet, its relay, its manager's desk and its load in one: what is asked again is read, or is not."""

    def __init__(self, folder: Path, is_read: bool) -> None:
        self.disk = folder
        self.is_read = is_read
        self.store_relay = self
        self.num_spoiled = 0
        self.is_suffering = False
        self.cleared: list[tuple[Tier, ...]] = []
        self.damaged = {Tier.DISK: 7.0, Tier.OBJECT: 2.0}

    def seen(self, path: Path) -> Path:
        return path

    async def num_damaged(self, tier: Tier) -> float:
        return self.damaged[tier]

    async def clear(self, *tiers: Tier) -> None:
        self.cleared.append(tiers)

    async def suffer(self, kind: FaultKind, _seconds: float) -> None:
        assert kind is FaultKind.STORE_CORRUPT
        self.is_suffering = True
        for _ in range(20):
            await asyncio.sleep(0)
        self.is_suffering = False

    async def ask_all(self, questions: list[Any]) -> None:
        assert questions and self.cleared
        await asyncio.sleep(0)
        if self.is_read and self.is_suffering:
            self.num_spoiled += 1
            self.damaged[Tier.OBJECT] += 1
        elif self.is_read:
            self.damaged[Tier.DISK] += 3


def done(fleet: Fleet, fault: Fault, monkeypatch: pytest.MonkeyPatch, num_asked: int = 50) -> str:
    monkeypatch.setattr(tier_faults, "ManagerDesk", lambda _: fleet)
    questions = Questions(1, 10)
    for _ in range(num_asked):
        questions.next()

    async def play() -> str:
        faults = TierFaults(fleet, fleet, questions, random.Random(1))  # type: ignore[arg-type]
        return await faults.actions[fault.kind](fault)

    return asyncio.run(play())


def test_damaged_blocks_on_disk_are_read_once_the_host_tier_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("blocks", "records"):
        (tmp_path / name).write_bytes(bytes([1]) * 4096)
    fleet = Fleet(tmp_path, is_read=True)
    assert "3 blocks were read and found damaged" in done(fleet, ON_DISK, monkeypatch)
    assert fleet.cleared == [(Tier.HOST,)]
    changed = [name for name in ("blocks", "records") if set((tmp_path / name).read_bytes()) != {1}]
    assert len(changed) == 1


def test_objects_are_read_changed_while_the_tiers_above_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, is_read=True)
    told = done(fleet, IN_STORE, monkeypatch)
    assert f"{fleet.num_spoiled} objects were read changed" in told
    assert f"{fleet.num_spoiled} blocks found damaged" in told
    assert set(fleet.cleared) == {(Tier.HOST, Tier.DISK)}


@pytest.mark.parametrize("fault", [ON_DISK, IN_STORE])
def test_what_nobody_has_read_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    (tmp_path / "blocks").write_bytes(bytes([1]) * 4096)
    (tmp_path / "records").write_bytes(bytes([1]) * 4096)
    with pytest.raises(Victimless, match="read"):
        done(Fleet(tmp_path, is_read=False), fault, monkeypatch)


def test_there_must_be_something_to_damage_and_somebody_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Victimless, match="nothing on disk"):
        done(Fleet(tmp_path, is_read=True), ON_DISK, monkeypatch)
    with pytest.raises(Victimless, match="nothing was asked"):
        done(Fleet(tmp_path, is_read=True), IN_STORE, monkeypatch, num_asked=0)
    fleet: Any = SimpleNamespace(store_relay=None)
    with pytest.raises(Victimless, match="no object store"):
        done(fleet, IN_STORE, monkeypatch)
