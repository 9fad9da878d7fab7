"""A mount namespace for one fleet: its own /dev/shm and its own disk, small enough to be filled, and slow on demand.

Nothing of the machine is filled or frozen; all of it goes when the last process of the fleet has ended. Needs root. It
knows no fleet, only the command that is to run in there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kelp.chaos.leaks import SHARED_MEMORY

_MEMORY_BYTES = 1 << 30
_DISK_BYTES = 256 << 20
_TOOLS = ("unshare", "mount", "mkfs.ext4")
_ENTER = ("unshare", "--mount", "--propagation", "private")
_SCRIPT = 'mount -t tmpfs -o size=$1,mode=1777 kelp-chaos "$2"; mount -o loop "$3" "$4"; shift 4; exec "$@"'
_FREEZE, _THAW = 0xC0045877, 0xC0045878
"""FIFREEZE and FITHAW of ioctl_fs(2): writes to a file system wait in between."""
_FROZEN_S, _THAWED_S = 0.4, 0.1
_FREEZER = """
import fcntl, os, sys, time
path, *numbers = sys.argv[1:]
seconds, freeze, thaw, frozen_s, thawed_s = map(float, numbers)
disk, end_s = os.open(path, os.O_RDONLY | os.O_DIRECTORY), time.monotonic() + seconds
while time.monotonic() < end_s:
    fcntl.ioctl(disk, int(freeze), 0)
    try:
        time.sleep(frozen_s)
    finally:
        fcntl.ioctl(disk, int(thaw), 0)
    time.sleep(thawed_s)
"""
"""A process by itself: one that writes to the disk, as this one may, would never come to thaw it."""
_FILLING = "kelp-chaos-filling"


class Room:
    """Made before its command runs.

    Args:
        folder: Takes the disk's image; must exist.
        disk: Where the disk is mounted, seen from inside; made if need be.
    """

    def __init__(self, folder: Path, disk: Path) -> None:
        self._image = folder / "disk.image"
        self._disk = disk
        self._pid: int | None = None
        self._memory_fd: int | None = None
        with self._image.open("wb") as file:
            file.truncate(_DISK_BYTES)
        disk.mkdir(exist_ok=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(self._image)], check=True)

    def fault(self) -> str:
        """Why nothing can run in here; empty where it can."""
        tried = subprocess.run(self.around(["true"]), capture_output=True, text=True)
        return f"cannot mount: {tried.stderr.strip()}" if tried.returncode else ""

    def around(self, command: Sequence[str]) -> list[str]:
        """A command line that runs a command in here, as the same process."""
        mounts = (str(_MEMORY_BYTES), str(SHARED_MEMORY), str(self._image), str(self._disk))
        return [*_ENTER, "sh", "-ec", _SCRIPT, "kelp-chaos", *mounts, *command]

    def enter(self, pid: int) -> None:
        """Look through a process that runs in here; its /dev/shm can be seen until `close`, also without it."""
        self._pid = pid
        self._memory_fd = os.open(self.view(SHARED_MEMORY), os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        """Look no longer."""
        if self._memory_fd is not None:
            os.close(self._memory_fd)
        self._memory_fd = None
        self._image.unlink(missing_ok=True)

    def view(self, path: Path) -> Path:
        """How a path of in here is reached from outside, while the process lives."""
        assert self._pid is not None
        return Path(f"/proc/{self._pid}/root{path}")

    @property
    def memory(self) -> Path:
        """How /dev/shm is reached, also after the fleet's end."""
        assert self._memory_fd is not None
        return Path(f"/proc/self/fd/{self._memory_fd}")

    async def fill_memory(self, seconds: float) -> int:
        """Leave nothing free in /dev/shm for so long; the bytes that it took."""
        return await _filled(self.memory, seconds)

    async def fill_disk(self, seconds: float) -> int:
        """The same for the disk."""
        return await _filled(self.view(self._disk), seconds)

    async def slow_disk(self, seconds: float) -> None:
        """Let writes to the disk wait most of the time.

        Raises:
            OSError: The disk cannot be frozen, or the fleet has ended.
        """
        arguments = (str(self.view(self._disk)), str(seconds), str(_FREEZE), str(_THAW), str(_FROZEN_S), str(_THAWED_S))
        # Of a session of its own: whatever ends this process, the disk thaws.
        freezer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _FREEZER, *arguments, stderr=asyncio.subprocess.PIPE, start_new_session=True
        )
        _, said = await freezer.communicate()
        if freezer.returncode:
            raise OSError(f"the disk cannot be slowed down: {(said.decode().strip().splitlines() or [''])[-1]}")


def make_room(folder: Path, disk: Path) -> tuple[Room | None, str]:
    """A room, or why there can be none here; for the arguments see `Room`."""
    if os.geteuid() != 0:
        return None, "needs root, for a /dev/shm and a disk of its own"
    if lacking := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return None, f"needs {', '.join(lacking)}"
    room = Room(folder, disk)
    if fault := room.fault():
        room.close()
        return None, fault
    return room, ""


async def _filled(folder: Path, seconds: float) -> int:
    filling = folder / _FILLING
    try:
        num_bytes = await asyncio.to_thread(fill, filling)
        await asyncio.sleep(seconds)
    finally:
        # In a thread: the disk may be frozen meanwhile.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(filling.unlink)
    return num_bytes


def fill(path: Path) -> int:
    """Take all that is free on a file system, in ever smaller pieces; how many bytes that was."""
    taken, piece = 0, 1 << 26
    with path.open("wb") as file:
        while piece >= os.statvfs(path).f_frsize:
            try:
                os.posix_fallocate(file.fileno(), taken, piece)
                taken += piece
            except OSError:
                piece //= 2
    return taken
