"""A fleet's own /dev/shm and disk: filled and frozen without the machine noticing."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kelp.chaos import room as rooms
from kelp.chaos.leaks import SHARED_MEMORY, take_footprint
from kelp.chaos.room import Room, fill, make_room
from support.waiting import until, wait_until

_INSIDE = 'echo > /dev/shm/"$1"; echo > "$2"/block; read line'
_NAME = "kelp-room-under-test"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """With a shell in it that has written a file to each of its file systems, and waits."""
    monkeypatch.setattr(rooms, "_MEMORY_BYTES", 4 << 20)
    monkeypatch.setattr(rooms, "_DISK_BYTES", 8 << 20)
    disk = tmp_path / "disk"
    made, why_not = make_room(tmp_path, disk)
    if made is None:
        pytest.skip(why_not)
    command = made.around(["sh", "-c", _INSIDE, "sh", _NAME, str(disk)])
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: Path(f"/proc/{process.pid}/root{disk}/block").exists(), "the shell", 30)
        made.enter(process.pid)
        yield made
        process.kill()
    assert os.listdir(made.memory) == [_NAME]
    made.close()


def _is_full(folder: Path) -> bool:
    return os.statvfs(folder).f_bavail == 0


def test_what_is_written_inside_is_seen_through_the_room_alone(room: Room, tmp_path: Path) -> None:
    assert not (SHARED_MEMORY / _NAME).exists()
    assert (room.memory / _NAME).exists()
    assert list((tmp_path / "disk").iterdir()) == []
    assert (room.view(tmp_path / "disk") / "block").exists()
    footprint = take_footprint({}, tmp_path, view=room.memory)
    assert footprint.existing == {str(SHARED_MEMORY / _NAME)}


def test_memory_and_disk_are_full_for_a_while_and_empty_again(room: Room, tmp_path: Path) -> None:
    async def play() -> None:
        for folder, filling in (
            (room.memory, room.fill_memory),
            (room.view(tmp_path / "disk"), room.fill_disk),
        ):
            running = asyncio.ensure_future(filling(60.0))
            await until(lambda folder=folder: _is_full(folder), "a full file system", 30)  # type: ignore[misc]
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            # ext4 gives the blocks of a file that has gone back at its next commit.
            await until(lambda folder=folder: not _is_full(folder), "room", 30)  # type: ignore[misc]

    asyncio.run(play())


def test_writes_to_a_slow_disk_come_through_in_the_end(room: Room, tmp_path: Path) -> None:
    path = room.view(tmp_path / "disk") / "written"

    async def play() -> None:
        slow = asyncio.ensure_future(room.slow_disk(0.1))
        await asyncio.to_thread(path.write_bytes, b"x")
        await slow

    asyncio.run(play())
    assert path.read_bytes() == b"x"


def test_nobody_but_root_gets_a_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms.os, "geteuid", lambda: 1000)
    made, why_not = make_room(tmp_path, tmp_path / "disk")
    assert made is None
    assert "root" in why_not


def test_filling_takes_what_there_is(room: Room) -> None:
    path = room.memory / "filling"
    num_bytes = fill(path)
    assert path.stat().st_size == num_bytes
    assert _is_full(room.memory)
    path.unlink()
