"""What stays behind: of the requests while the fleet lives, and of the fleet once it has been stopped."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kelp.core.messages import WorkerStatus

SHARED_MEMORY = Path("/dev/shm")
_UNFINISHED = ".new-*"
_FIRST_PATH_COLUMN = 5


@dataclass(frozen=True, slots=True)
class Leak:
    """Something that should not be there.

    Attributes:
        kind: `blocks`, `leases`, `slots`, `queue`, `manager`, `process`, `file`, `shared-memory` or `port`.
    """

    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a fleet occupies at a moment.

    Attributes:
        processes: Names by process id.
        mapped: Files below /dev/shm that a living process of the fleet has mapped.
        existing: Files that exist there.
        unfinished: Files of the registry that a write has left half done.
    """

    processes: Mapping[int, str]
    mapped: frozenset[str]
    existing: frozenset[str]
    unfinished: frozenset[str] = frozenset()


def held(statuses: Mapping[str, WorkerStatus | None]) -> list[Leak]:
    """What workers hold though nobody asks anything; a worker that does not answer is told as a process."""
    found: list[Leak] = []
    for name, status in sorted(statuses.items()):
        if status is None:
            found.append(Leak("process", f"{name} does not answer"))
            continue
        num_used = status.num_blocks - status.num_free_blocks - status.num_cached_blocks
        num_sequences = status.num_running + status.num_waiting
        for kind, count in (("blocks", num_used), ("leases", status.num_leases), ("slots", num_sequences)):
            if count:
                found.append(Leak(kind, f"{name} holds {count}"))
    return found


def left_in_life(footprint: Footprint, seen: Iterable[str]) -> list[Leak]:
    """Of a fleet that lives: shared memory that was mapped once and now belongs to nobody, and unfinished files.

    Args:
        footprint: Now.
        seen: Shared memory that was mapped at any time before.
    """
    orphaned = (frozenset(seen) & footprint.existing) - footprint.mapped
    regions = [Leak("shared-memory", f"{path} is mapped by no process of the fleet") for path in sorted(orphaned)]
    return regions + [Leak("file", path) for path in sorted(footprint.unfinished)]


def left_after(footprint: Footprint, seen: Iterable[str], files: Iterable[str], ports: Iterable[int]) -> list[Leak]:
    """Of a fleet that has been stopped.

    Args:
        footprint: Now.
        seen: Shared memory that was mapped at any time.
        files: What is left in its temporary folder.
        ports: Of its own that somebody still listens at.
    """
    return [
        *(Leak("process", f"{name} ({pid})") for pid, name in sorted(footprint.processes.items())),
        *(Leak("shared-memory", path) for path in sorted(frozenset(seen) & footprint.existing)),
        *(Leak("file", path) for path in sorted(files)),
        *(Leak("port", str(port)) for port in sorted(ports)),
    ]


def count_by_kind(leaks: Iterable[Leak]) -> dict[str, int]:
    """How many there are of each kind."""
    return dict(Counter(leak.kind for leak in leaks))


def take_footprint(
    processes: Mapping[int, str], registry: Path, memory: Path = SHARED_MEMORY, view: Path | None = None
) -> Footprint:
    """Look at the machine; a process that ends meanwhile has nothing mapped.

    Args:
        processes: Names by process id.
        registry: Its folder.
        memory: Where the processes see shared memory.
        view: Where we see it, if elsewhere.
    """
    mapped: set[str] = set()
    for pid in processes:
        with contextlib.suppress(OSError):
            mapped |= mapped_below(memory, Path(f"/proc/{pid}/maps").read_text())
    unfinished = {str(path) for path in registry.glob(_UNFINISHED)} if registry.is_dir() else set()
    existing = _files_below(view or memory, memory)
    return Footprint(dict(processes), frozenset(mapped), frozenset(existing), frozenset(unfinished))


def mapped_below(folder: Path, maps: str) -> set[str]:
    """Files below a folder in a `/proc/<pid>/maps`; not those that have been removed."""
    found = set()
    for line in maps.splitlines():
        columns = line.split(maxsplit=_FIRST_PATH_COLUMN)
        path = columns[_FIRST_PATH_COLUMN] if len(columns) > _FIRST_PATH_COLUMN else ""
        if path.startswith(f"{folder}{os.sep}") and not path.endswith(" (deleted)"):
            found.add(path)
    return found


def _files_below(view: Path, folder: Path) -> set[str]:
    found = (os.path.join(place, name) for place, _, names in os.walk(os.path.join(view, "")) for name in names)
    return {str(folder / os.path.relpath(path, view)) for path in found}
