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
    WORKER_RELOADED = "worker-reloaded"
    """Drained, then started anew."""
    SERVER_KILLED = "server-killed"
    """SIGKILL of the tritonserver that one worker has to itself."""
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

_ISOLATED_ONLY = frozenset({FaultKind.SERVER_KILLED, FaultKind.FRONT_KILLED})
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


def kinds_for(layout: Layout) -> tuple[FaultKind, ...]:
    """Kinds that make sense on a fleet of this layout.

    A worker or the front of the compact layout has no tritonserver to itself.
    """
    return tuple(kind for kind in FaultKind if layout is Layout.ISOLATED or kind not in _ISOLATED_ONLY)
