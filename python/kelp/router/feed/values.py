"""What goes into `router.feed.subscription` and what comes out of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kelp.core.kv_events import KVEvent
from kelp.kv.events.codec import ForeignEvent


class SubscriptionState(str, enum.Enum):
    """How far the index may be trusted about a worker.

    `LIVE`: it holds what the worker holds, but for messages on their way. `RECOVERING`: something was missed and has
    been asked for. `APPROXIMATE`: what it holds is true, but not all; or the worker does not publish (any more).
    """

    LIVE = "live"
    RECOVERING = "recovering"
    APPROXIMATE = "approximate"


class Phase(enum.Enum):
    """What a subscription is waiting for: batches, the answer to one of its requests, or the time for the next one."""

    FOLLOW = "follow"
    REPLAY = "replay"
    SNAPSHOT = "snapshot"
    WAIT = "wait"


class Dialect(enum.Enum):
    """Who publishes: a kelp worker gives snapshots and digests, a foreign engine does not."""

    UNKNOWN = "unknown"
    OWN = "own"
    FOREIGN = "foreign"


class Batch(NamedTuple):
    """One batch; `events` is None where the payload could not be read. `ts`: the publisher's wall clock, seconds."""

    seq: int
    ts: float
    events: Sequence[KVEvent] | Sequence[ForeignEvent] | None
    is_foreign: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """Everything about the worker is void."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Apply these events, in order."""

    events: Sequence[KVEvent] | Sequence[ForeignEvent]


@dataclass(frozen=True, slots=True)
class AskReplay:
    """Ask for batches from `start_seq` on; earlier attempts are void."""

    attempt: int
    start_seq: int


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """Ask for a snapshot; earlier attempts are void."""

    attempt: int


Action = Forget | Apply | AskReplay | AskSnapshot


@dataclass(slots=True)
class SubscriptionCounts:
    """What has happened since the start."""

    num_gaps: int = 0
    num_replays: int = 0
    num_snapshots: int = 0
    num_drifts: int = 0
    num_restarts: int = 0
    num_failures: int = 0
    num_lost: int = 0

    def by_kind(self) -> dict[str, int]:
        """The same by the label that metrics give each."""
        return {
            "gap": self.num_gaps,
            "replay": self.num_replays,
            "snapshot": self.num_snapshots,
            "drift": self.num_drifts,
            "restart": self.num_restarts,
            "failure": self.num_failures,
            "lost": self.num_lost,
        }
