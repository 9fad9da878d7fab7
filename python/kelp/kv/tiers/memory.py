"""How much host memory may be taken without being killed for it: the machine's, the container's, the tmpfs's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def free_memory_bytes(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> int:
    """Memory that this process can still take, page cache that would make room included.

    Args:
        membership: Which control groups this process is in.
        root: Where control groups are mounted, version 1 or 2.
    """
    return min([psutil.virtual_memory().available, *_group_limits(membership, root)])


def _group_limits(membership: Path, root: Path) -> Iterator[int]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _free_upwards(root, path, ("memory.max", "memory.current", "inactive_file"))
        elif controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _free_upwards(root / "memory", path, names)


def _free_upwards(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    # Inside a container the path may be the host's, and only the mount's root is there.
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and used is not None:
            yield max(0, limit - used + _reclaimable(folder / "memory.stat", names[2]))
        if folder == root:
            return


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(file: Path, name: str) -> int:
    try:
        fields = dict(line.split(" ", 1) for line in file.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0
