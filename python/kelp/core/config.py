"""The one configuration schema.

Read from one YAML file (`KELP_CONFIG` names it; `kelp serve` writes one per run) and, on top of it, from the
`parameters` of a model's config.pbtxt, whose keys are dotted field names (`executor.num_blocks`). Unknown keys
are refused. `kelp doctor` prints the effective values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from kelp.core.config_kv import DiskTierConfig, KvManagerConfig, ObjectTierConfig, OffloadConfig
from kelp.core.config_kv import EventsConfig as EventsConfig
from kelp.core.config_peers import PeersConfig
from kelp.core.config_registry import RegistryConfig as RegistryConfig
from kelp.core.config_replicas import DirectConfig, QueueConfig, ReplicasConfig
from kelp.core.config_resilience import DrainConfig, WatchdogConfig
from kelp.core.config_routing import PolicyName as PolicyName
from kelp.core.config_routing import RoutingConfig as RoutingConfig
from kelp.core.config_supervision import SupervisionConfig
from kelp.core.config_values import Group as _Group
from kelp.core.config_values import Positive as _Positive
from kelp.core.errors import ConfigError
from kelp.core.wire import VersionName

CONFIG_ENV = "KELP_CONFIG"
"""The only environment variable that kelp itself reads: path of the YAML file."""

_Port = Annotated[int, Field(ge=1, le=65535)]
_Tag = Annotated[str, Field(min_length=1, max_length=256)]
_AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]


def default_cache_folder() -> Path:
    """Where converted models and the Triton layout live."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kelp"


class ModelConfig(_Group):
    """Which model is served."""

    path: Path = Field(default_factory=lambda: default_cache_folder() / "models" / "default")
    """Hugging Face folder (config.json, tokenizer.json, *.safetensors); `make setup` prepares the default."""
    version: VersionName = "base"
    """What this model is called where several versions of it serve side by side (`kelp traffic`)."""
    lora_adapters: dict[_AdapterName, Path] = {}
    """PEFT folders (adapter_config.json, adapter_model.safetensors) by the name that requests give as `lora_name`."""


class ExecutorConfig(_Group):
    """How one worker runs the model."""

    engine: Literal["torch", "mock"] = "torch"
    """Which executor implementation; `mock` computes nothing and takes the time that `mock.timing` says."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and KV."""
    device: str = "auto"
    """`auto` (CUDA where present), `cpu` or `cuda:<n>`."""
    attention: Literal["auto", "varlen", "split-kv", "native", "gather"] = "auto"
    """How attention reads KV: torch's `varlen_attn` or own Triton kernels (CUDA), own C kernels (CPU, bfloat16), or
    copies; `auto` takes what is fastest of what works here. Another value is taken or refused at load."""
    enable_cuda_graphs: bool = True
    """Replay decoding steps as CUDA graphs, captured when a batch size first occurs."""
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens per KV block."""
    num_blocks: Annotated[int, Field(ge=0)] = 0
    """KV blocks per worker; 0 sizes the pool for `kv_memory_fraction` of free memory, 4096 at most on CPU."""
    kv_memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of free memory that an automatically sized pool takes."""
    max_model_tokens: Annotated[int, Field(ge=0)] = 0
    """Prompt plus output limit; 0 takes the model's own."""
    max_step_tokens: Annotated[int, Field(ge=1)] = 512
    """Token budget of one step: decodes first, the rest is prefill chunk."""
    max_running: Annotated[int, Field(ge=1)] = 64
    """Sequences per step."""
    max_waiting: Annotated[int, Field(ge=1)] = 512
    """Queued sequences beyond which a request is refused with KELP_OVERLOADED."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the engine; 0 divides the cores among the workers that share them."""
    enable_prefix_cache: bool = True
    """Reuse blocks of equal prefixes."""
    num_draft_tokens: Annotated[int, Field(ge=0, le=32)] = 8
    """Most tokens that a step guesses ahead for a sequence that repeats earlier text; 0 for none. Fewer are tried while
    guesses fail or many sequences run."""


_Seconds = Annotated[float, Field(ge=0)]
_TierSeconds = tuple[_Seconds, _Seconds, _Seconds, _Seconds]


class MockTimingConfig(_Group):
    """What the mock executor's steps and transfers take; see `timing.model.TimingModel`."""

    step_s: _Seconds = 8e-3
    """Every step."""
    prefill_token_s: _Seconds = 5e-5
    """Each prompt token computed."""
    attention_pair_s: _Seconds = 2e-9
    """Each prompt token computed, times the tokens before it."""
    decode_sequence_s: _Seconds = 5e-5
    """Each decoding sequence of a step."""
    decode_context_s: _Seconds = 5e-8
    """Each token of KV that a decoding sequence reads in a step."""
    transfer_s: _Seconds = 2e-3
    """Each transfer of KV between workers."""
    transfer_block_s: _Seconds = 1e-4
    """Each block of it."""
    onboard_s: _TierSeconds = (0.0, 5e-4, 2e-3, 2e-2)
    """Each onboarding from a lower tier: device (unused), host, disk, object store."""
    onboard_block_s: _TierSeconds = (0.0, 1e-4, 6e-4, 3e-3)
    """Each block of it."""


class MockConfig(_Group):
    """The mock executor (`executor.engine: mock`)."""

    speedup: Annotated[float, Field(ge=0)] = 1.0
    """Everything takes this many times less than `timing` says; 0 takes no time at all."""
    tokens_per_step: Annotated[int, Field(ge=1, le=64)] = 1
    """Tokens that a decoding sequence gains in a step: one, and drafts that are always right."""
    timing: MockTimingConfig = MockTimingConfig()
    """The worker that is played."""
    fatal_token_id: Annotated[int, Field(ge=-1)] = -1
    """Computing this token kills the worker's process, as an engine's crash would; -1 for none."""
    hang_token_id: Annotated[int, Field(ge=-1)] = -1
    """Computing this token for the first time takes `hang_s`; -1 for none."""
    hang_s: _Positive = 10.0
    """How long."""
    breaking_token_id: Annotated[int, Field(ge=-1)] = -1
    """Computing this token fails, and so does every step after it, as with a device that has faulted; -1 for none."""


class HandoffConfig(_Group):
    """KV handoff between prefill and decode workers."""

    transport: Literal["nixl", "local"] = "nixl"
    """`local` works inside one process only and exists for tests."""
    host: str = "127.0.0.1"
    """Address the handoff service binds and announces."""
    lease_ttl_s: _Positive = 10.0
    """Blocks of a finished prefill are held this long without a heartbeat of the reader."""
    transfer_timeout_s: _Positive = 30.0
    """A READ that takes longer is abandoned and its memory quarantined."""
    attach_timeout_s: _Positive = 5.0
    """How long a decode worker tries to reach the prefill worker."""


class RouterConfig(_Group):
    """The `llm` model."""

    policy: PolicyName = "kelp"
    """How a worker is chosen."""
    disaggregation: Literal["auto", "always", "never"] = "auto"
    """`auto` uses a prefill worker where one is ready; `always` refuses without one."""
    default_deadline_s: _Positive = 600.0
    """Deadline of requests without `deadline_ms`."""
    idle_timeout_s: _Positive = 60.0
    """A worker stream silent for this long counts as lost."""
    first_token_timeout_s: _Positive = 300.0
    """A worker that shows signs of life, but not the first token for this long, is left for another one."""
    next_token_timeout_s: _Positive = 120.0
    """The same between tokens."""
    max_migrations: Annotated[int, Field(ge=0, le=16)] = 3
    """How often a sequence goes on at another worker, or tries the same one again, before it fails."""
    recovery_wait_s: Annotated[float, Field(ge=0)] = 15.0
    """How long an answer that has begun, or whose worker died, drains or hangs, waits for a worker when none is left:
    a supervisor may be restarting one."""
    absence_wait_s: Annotated[float, Field(ge=0)] = 2.0
    """How long a new request that may go anywhere waits where no worker is ready: one may be just coming back."""
    suspect_wait_s: Annotated[float, Field(ge=0)] = 2.0
    """How long a request whose worker died before its first token waits for one where no other such request is."""
    max_prefill_retries: Annotated[int, Field(ge=0, le=10)] = 1
    """Other prefill workers tried before the decode worker computes the prompt itself."""
    max_request_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024 * 1024
    """Refuse larger prompts before looking at them."""
    inline_prompt_chars: Annotated[int, Field(ge=0)] = 16 * 1024
    """Prompts up to this length are tokenised by the router itself, longer ones by `preprocess`; 0 for all by it."""
    one_cpu: bool = True
    """Each router's process keeps to one CPU, which it chooses when it starts (`core.one_cpu`); false leaves it to the
    system."""
    max_stop_words: Annotated[int, Field(ge=1)] = 64
    """Entries in `stop_words` and in `bad_words`."""
    max_return_sequences: Annotated[int, Field(ge=1)] = 16
    """Most sequences of one request (`num_return_sequences`); each is generated like a request of its own."""
    cancel_poll_s: _Positive = 0.1
    """How often Triton is asked whether the client has gone."""


class ServerConfig(_Group):
    """The tritonserver that a model runs in."""

    host: str = "127.0.0.1"
    """Address workers announce to routers."""
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Triton's gRPC port; 0 reads it off the parent tritonserver's command line (default 8001)."""
    workers_on_host: Annotated[int, Field(ge=1)] = 2
    """Workers that share this host's cores; divides CPU threads."""
    tags: dict[_Tag, _Tag] = {}
    """Where this server stands, `zone` and `rack` for example; requests may require or prefer values."""
    router_instances: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of `llm`, each a router of its own; `kelp serve` starts that many."""


class KelpConfig(_Group):
    """Everything a kelp model reads at load."""

    model: ModelConfig = ModelConfig()
    executor: ExecutorConfig = ExecutorConfig()
    mock: MockConfig = MockConfig()
    handoff: HandoffConfig = HandoffConfig()
    direct: DirectConfig = DirectConfig()
    drain: DrainConfig = DrainConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    router: RouterConfig = RouterConfig()
    routing: RoutingConfig = RoutingConfig()
    queue: QueueConfig = QueueConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    events: EventsConfig = EventsConfig()
    kv_manager: KvManagerConfig = KvManagerConfig()
    disk_tier: DiskTierConfig = DiskTierConfig()
    object_tier: ObjectTierConfig = ObjectTierConfig()
    offload: OffloadConfig = OffloadConfig()
    registry: RegistryConfig = RegistryConfig()
    server: ServerConfig = ServerConfig()
    peers: PeersConfig = PeersConfig()


def _nest(parameters: Mapping[str, str]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in parameters.items():
        *groups, field = key.split(".")
        target = nested
        for group in groups:
            target = target.setdefault(group, {})
        target[field] = yaml.safe_load(value)
    return nested


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{CONFIG_ENV}={path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{CONFIG_ENV}={path}: not YAML: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{CONFIG_ENV}={path}: the document must be a mapping")
    return document


def load_config(parameters: Mapping[str, str] | None = None, path: Path | None = None) -> KelpConfig:
    """Effective configuration: defaults, then the YAML file, then dotted `parameters`.

    Args:
        parameters: For example `{"executor.dtype": "float32"}`; values are YAML scalars.
        path: The YAML file; without one, the file that `KELP_CONFIG` names, if any.

    Raises:
        ConfigError: Unreadable file, unknown key or bad value; names the field.
    """
    if path is None and os.environ.get(CONFIG_ENV):
        path = Path(os.environ[CONFIG_ENV])
    document = _read_yaml(path) if path is not None else {}
    merged = _merge(document, _nest(parameters or {}))
    try:
        return KelpConfig.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{field}: no such field; `kelp doctor` prints all of them") from None
        raise ConfigError(f"{field}: {first['msg']} (got {first['input']!r})") from None
