"""What a fleet under test is made of, and how `kelp serve` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kelp.chaos.faults import Layout
from kelp.supervisor.model import models_folder
from kelp.supervisor.plan import worker_names

HOST = "127.0.0.1"
MANAGER_SETTING = "kv_manager.enabled"
_DEADLINES_S = {"mock": 60.0}
_SLOW_DEADLINE_S = 300.0
"""On two cores a torch worker is back after half a minute, longer with others beside it, and is hit again by then."""
_BURSTS = {"mock": 48}
_SLOW_BURST = 16
_MOCK_OBJECT_BYTES = 1024
"""A mock block is 128 bytes: some prompts fill several objects, and few none."""


def usual_burst(engine: str) -> int:
    """Requests at once that are more than the fleet's workers have places for, and are answered or shed in time."""
    return _BURSTS.get(engine, _SLOW_BURST)


def usual_deadline_s(engine: str) -> float:
    """Of requests that are to be answered whatever happens meanwhile."""
    return _DEADLINES_S.get(engine, _SLOW_DEADLINE_S)


def quick_settings(engine: str) -> dict[str, str]:
    """Configuration that shows much in a short time: small steps and tiers, quick expiry, KV events that go astray."""
    settings = {
        "executor.num_blocks": "1024",
        "executor.max_running": "16",
        "executor.max_step_tokens": "64",
        "handoff.lease_ttl_s": "3",
        "handoff.attach_timeout_s": "2",
        "registry.heartbeat_s": "0.5",
        "registry.expiry_s": "3",
        "kv_manager.host_bytes": str(64 * 1024**2),
        "disk_tier.max_bytes": str(128 * 1024**2),
        "object_tier.object_bytes": str(256 * 1024),
        "offload.onboard": "always",
        "events.drop_share": "0.02",
        "events.duplicate_share": "0.02",
        "events.reorder_share": "0.02",
        "watchdog.step_timeout_s": "4",
        "supervision.longest_backoff_s": "4",
    }
    by_engine = {
        "mock": {
            "mock.timing.step_s": "0.02",
            "executor.num_blocks": "384",
            "kv_manager.host_bytes": str(8 * 1024**2),
            "disk_tier.max_bytes": str(16 * 1024**2),
            "object_tier.object_bytes": str(_MOCK_OBJECT_BYTES),
        },
        "torch": {
            "executor.dtype": "float32",
            "executor.num_blocks": "384",
            "executor.max_running": "6",
            "router.recovery_wait_s": "45",
            "watchdog.step_timeout_s": "10",
            "registry.expiry_s": "6",
        },
    }
    return {**settings, **by_engine.get(engine, {})}


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """An S3-compatible object store that runs already.

    Attributes:
        credentials: Environment of the fleet beside our own; without, ours has what is needed.
    """

    host: str
    port: int
    bucket: str
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def settings(self, endpoint: str) -> dict[str, str]:
        """Configuration of a fleet that reaches it at another endpoint."""
        return {
            "object_tier.endpoint": endpoint,
            "object_tier.bucket": self.bucket,
            "object_tier.timeout_s": "1",
            "object_tier.retry_after_s": "1",
            "object_tier.refresh_s": "5",
        }


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """What is served.

    Attributes:
        settings: Further configuration fields.
        store: Of the fleet's KV, with a relay in between that breaks it.
    """

    layout: Layout
    engine: str = "mock"
    num_prefill: int = 1
    num_decode: int = 2
    num_routers: int = 1
    model: Path | None = None
    settings: dict[str, str] = field(default_factory=dict)
    store: StoreSpec | None = None

    @property
    def has_manager(self) -> bool:
        """Whether a KV block manager belongs to it."""
        return self.settings.get(MANAGER_SETTING) != "false"

    @property
    def prefill_workers(self) -> tuple[str, ...]:
        """Their models' names."""
        return tuple(worker.name for worker in worker_names("prefill", self.num_prefill))

    @property
    def decode_workers(self) -> tuple[str, ...]:
        """The same for decode workers."""
        return tuple(worker.name for worker in worker_names("decode", self.num_decode))

    @property
    def model_folder(self) -> Path:
        """Where its tokenizer is."""
        return self.model or models_folder() / "default"

    def arguments(self) -> list[str]:
        """Of `kelp serve`."""
        return [
            *("--mode", "disaggregated" if self.num_prefill else "aggregated", "--engine", self.engine),
            *("--prefill", str(self.num_prefill), "--decode", str(self.num_decode)),
            *("--routers", str(self.num_routers), "--host", HOST),
            *(("--model", str(self.model)) if self.model else ()),
            *(("--isolate",) if self.layout is Layout.ISOLATED else ()),
            *(part for name, value in self.settings.items() for part in ("--set", f"{name}={value}")),
        ]
