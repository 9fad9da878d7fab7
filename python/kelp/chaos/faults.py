"""Which faults there are, and where each of them makes sense; how they are done stands in `injector` and `load`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Layout(str, enum.Enum):
    """How the fleet's processes are laid out."""

    COMPACT = "compact"
    ISOLATED = "isolated"


class FaultKind(str, enum.Enum):
    """What happens."""

    WORKER_KILLED = "worker-killed"
    """SIGKILL of a worker's process while it is in a phase."""
    WORKER_PAUSED = "worker-paused"
    """SIGSTOP, and SIGCONT within a second: Triton aborts when it finds a process stopped for longer."""
    WORKER_STUCK = "worker-stuck"
    """The thread of a worker's engine stands still for longer than a step may take, and nothing else of it."""
    WORKER_RELOADED = "worker-reloaded"
    """Drained, then started anew."""
    SERVER_KILLED = "server-killed"
    """SIGKILL of the tritonserver that one worker has to itself."""
    SERVER_TERMINATED = "server-terminated"
    """SIGTERM of that server, undrained."""
    ROUTER_KILLED = "router-killed"
    """SIGKILL of a process of `llm`."""
    ROUTER_RELOADED = "router-reloaded"
    """`llm` loaded anew beside itself; what runs in the old one ends there."""
    FRONT_KILLED = "front-killed"
    """SIGKILL of the tritonserver that clients talk to."""
    MANAGER_KILLED = "manager-killed"
    """SIGKILL of the KV block manager."""
    MANAGER_RELOADED = "manager-reloaded"
    """The KV block manager loaded anew."""
    REGISTRY_GONE = "registry-gone"
    """The registry's folder is away, and none can be made in its place, for seconds."""
    BLOCK_CORRUPTED = "block-corrupted"
    """Bytes of the disk tier's slots change."""
    MEMORY_FULL = "memory-full"
    """Nothing is free in the fleet's /dev/shm, for seconds."""
    DISK_FULL = "disk-full"
    """The same on the file system of the disk tier."""
    DISK_SLOW = "disk-slow"
    """What is written to that file system waits most of the time."""
    STORE_GONE = "store-gone"
    """The object store refuses connections."""
    STORE_SILENT = "store-silent"
    """It accepts them and never answers."""
    STORE_SLOW = "store-slow"
    """Some 40 KB a second come through."""
    STORE_REFUSING = "store-refusing"
    """It answers 503 to everything."""
    STORE_CORRUPT = "store-corrupt"
    """Bytes of what it answers change on the way."""
    CLIENT_LEFT = "client-left"
    """Clients go in a phase of their requests."""
    DEADLINE_PASSED = "deadline-passed"
    """Requests that cannot be answered in the time they give."""
    OVERLOAD = "overload"
    """Many requests at once."""
    BAD_INPUT = "bad-input"
    """Requests that must be refused."""


class Phase(str, enum.Enum):
    """Where a worker or a request is when the fault comes."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"


CLIENT_SIDE = frozenset({FaultKind.CLIENT_LEFT, FaultKind.DEADLINE_PASSED, FaultKind.OVERLOAD, FaultKind.BAD_INPUT})
"""Faults that need nothing but a client."""

OF_STORE = frozenset(
    {
        FaultKind.STORE_GONE,
        FaultKind.STORE_SILENT,
        FaultKind.STORE_SLOW,
        FaultKind.STORE_REFUSING,
        FaultKind.STORE_CORRUPT,
    }
)
"""Faults of an object store, for fleets that have one."""

_ISOLATED_ONLY = frozenset({FaultKind.SERVER_KILLED, FaultKind.SERVER_TERMINATED, FaultKind.FRONT_KILLED})
PHASES = {
    FaultKind.WORKER_KILLED: tuple(Phase),
    FaultKind.CLIENT_LEFT: tuple(Phase),
}
"""Phases that a kind of fault is done in; the others do not ask."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at_s: Seconds after the start of the load.
        target: Name of a worker model, for faults that concern one.
        lasts_s: How long, for faults that end by themselves.
    """

    at_s: float
    kind: FaultKind
    target: str = ""
    phase: Phase | None = None
    lasts_s: float = 0.0

    @property
    def name(self) -> str:
        """Kind and phase, as reports count them."""
        return self.kind.value if self.phase is None else f"{self.kind.value}/{self.phase.value}"


def kinds_for(layout: Layout, has_store: bool = False) -> tuple[FaultKind, ...]:
    """Kinds that make sense on a fleet of this layout, with an object store or without.

    A worker or the front of the compact layout has no tritonserver to itself.
    """
    absent = (frozenset() if layout is Layout.ISOLATED else _ISOLATED_ONLY) | (frozenset() if has_store else OF_STORE)
    return tuple(kind for kind in FaultKind if kind not in absent)
