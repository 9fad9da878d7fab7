"""The workers of a simulation, and how far they and the network are from what the router would like them to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kelp.core.errors import ConfigError
from kelp.core.types import Role, WorkerState
from kelp.registry.base import LayoutRecord, WorkerRecord
from kelp.timing.model import TimingModel


@dataclass(frozen=True, slots=True)
class TruthSpec:
    """How the true timings differ from the timing model; the router is told nothing of it.

    Attributes:
        bias: Each worker is slower or faster by a constant factor, uniform in `1 - bias .. 1 + bias`.
        noise: Standard deviation of the logarithm of each step's duration; the mean factor is 1.
        drift: Standard deviation of the change of the logarithm of a worker's speed in an hour, a random walk.
    """

    bias: float = 0.2
    noise: float = 0.05
    drift: float = 0.1


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """Seconds between router and workers.

    Attributes:
        delay_s: A request to its worker, or a token to the router, one way.
        events_delay_s: KV events from worker to router.
        events_loss: Share of event messages that are lost; the next one to arrive shows the gap.
        replay_s: From a gap being noticed to the missed events having been repeated.
    """

    delay_s: float = 1e-3
    events_delay_s: float = 5e-3
    events_loss: float = 0.0
    replay_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Churn:
    """A worker that joins or leaves during the run.

    Attributes:
        at_s: Virtual time.
        worker: Position in the fleet; a worker whose first change is to join is not there before.
        is_joining: Joins, with an empty cache; else it is gone with everything that it runs.
    """

    at_s: float
    worker: int
    is_joining: bool


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """A fleet: aggregated workers first, then prefill, then decode workers.

    Attributes:
        num_blocks: KV blocks of one worker, of the workload's block size.
        max_step_tokens: Token budget of one step.
        max_running: Sequences of one worker that run at once.
        timing: What the workers' costs are about.
        num_routers: Router replicas; arrivals take turns.
        churn: Joins and leaves by time.
    """

    num_workers: int = 0
    num_prefill: int = 0
    num_decode: int = 0
    num_blocks: int = 1024
    max_step_tokens: int = 4096
    max_running: int = 64
    timing: TimingModel = field(default_factory=TimingModel)
    truth: TruthSpec = field(default_factory=TruthSpec)
    network: NetworkSpec = field(default_factory=NetworkSpec)
    num_routers: int = 1
    churn: Sequence[Churn] = ()

    def __post_init__(self) -> None:
        """Raises `ConfigError` where no simulation is possible."""
        if not self.num_workers and not (self.num_prefill and self.num_decode):
            raise ConfigError("num_workers: 0 workers; give some, or both num_prefill and num_decode")
        if self.max_step_tokens < self.max_running:
            raise ConfigError(f"max_step_tokens: {self.max_step_tokens} is below max_running, {self.max_running}")
        if self.num_routers < 1:
            raise ConfigError(f"num_routers: {self.num_routers}, at least 1 is needed")
        if not 0 <= self.truth.bias < 1:
            raise ConfigError(f"truth.bias: {self.truth.bias} is outside 0 .. 1")
        if not 0 <= self.network.events_loss < 1:
            raise ConfigError(f"network.events_loss: {self.network.events_loss} is outside 0 .. 1")
        for change in self.churn:
            if not 0 <= change.worker < self.size:
                raise ConfigError(f"churn.worker: {change.worker} is outside the fleet of {self.size}")

    @property
    def size(self) -> int:
        """Workers of all roles."""
        return self.num_workers + self.num_prefill + self.num_decode

    def role(self, worker: int) -> Role:
        """What the worker at this position does."""
        if worker < self.num_workers:
            return Role.AGGREGATED
        return Role.PREFILL if worker < self.num_workers + self.num_prefill else Role.DECODE

    def record(self, worker: int, epoch: int, block_size: int) -> WorkerRecord:
        """The worker as it registers itself."""
        layout = LayoutRecord(
            num_blocks=self.num_blocks,
            num_layers=1,
            num_kv_heads=1,
            block_size=block_size,
            head_dim=1,
            dtype="bfloat16",
            model_id="simulated",
        )
        host = f"worker-{worker:05d}"
        endpoint = f"{host}:1"
        return WorkerRecord(
            worker_id=f"{host}/simulated",
            epoch=str(epoch),
            model_name="simulated",
            role=self.role(worker),
            state=WorkerState.READY,
            endpoint=endpoint,
            handoff_endpoint=endpoint,
            layout=layout,
            events_endpoint=endpoint,
            replay_endpoint=endpoint,
            max_step_tokens=self.max_step_tokens,
            max_running=self.max_running,
        )
