"""A tiny model folder, a recording sink, a client, and a copy of KV from one executor's memory to another's."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import FinishReason, Role
from kelp.executor.base import Completed, Executor, ExecutorEvent, ExecutorRequest, Failed, Prefilled, Reserved, Tokens

VOCAB_SIZE = 64
MAX_MODEL_TOKENS = 128
NUM_BLOCKS = 24
BLOCK_SIZE = 4
WAIT_S = 30.0
PROMPT = [5, 9, 2, 40, 33, 7, 7, 1, 60, 12]
"""Two full blocks and a half."""

_BESIDE = ("deadline_s", "num_generated", "tenant", "onboard_blocks")
Build = Callable[..., Executor]


def write_tiny_model(folder: Path) -> Path:
    """A seeded one-layer Llama without end-of-sequence id."""
    document = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": MAX_MODEL_TOKENS,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(document))
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "embed_tokens": (VOCAB_SIZE, 16),
        "layers.0.self_attn.q_proj": (16, 16),
        "layers.0.self_attn.k_proj": (8, 16),
        "layers.0.self_attn.v_proj": (8, 16),
        "layers.0.self_attn.o_proj": (16, 16),
        "layers.0.mlp.gate_proj": (32, 16),
        "layers.0.mlp.up_proj": (32, 16),
        "layers.0.mlp.down_proj": (16, 32),
        "layers.0.input_layernorm": (16,),
        "layers.0.post_attention_layernorm": (16,),
        "norm": (16,),
    }
    tensors = {f"model.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


class Recorder:
    """Events of one request, with waiting for the one that a test is about."""

    def __init__(self, executor: Executor, request_id: str) -> None:
        self.executor = executor
        self.request_id = request_id
        self.events: list[ExecutorEvent] = []
        self.on_event: Callable[[ExecutorEvent], None] = lambda event: None
        self._changed = threading.Condition()

    def __call__(self, event: ExecutorEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()
        self.on_event(event)

    def wait_for(self, *kinds: type) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: self._first(kinds) is not None, WAIT_S), self.events
            return self._first(kinds)

    def end(self) -> Completed | Failed:
        event: Completed | Failed = self.wait_for(Completed, Failed)
        return event

    def finish_reason(self) -> FinishReason | None:
        end = self.end()
        assert isinstance(end, Completed), end
        return end.finish_reason

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Tokens) for token in event.token_ids]

    @property
    def announced(self) -> list[int]:
        return [block for event in self.events if isinstance(event, Prefilled) for block in event.block_ids]

    def _first(self, kinds: tuple[type, ...]) -> ExecutorEvent | None:
        return next((event for event in self.events if isinstance(event, kinds)), None)


class Client:
    """Submits requests to one executor."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.num_submitted = 0

    def submit(self, prompt: list[int], role: Role = Role.AGGREGATED, **fields: Any) -> Recorder:
        request_id = fields.pop("request_id", f"request-{self.num_submitted}")
        recorder = Recorder(self.executor, request_id)
        recorder.on_event = fields.pop("on_event", recorder.on_event)
        self.num_submitted += 1
        beside = {name: fields.pop(name) for name in _BESIDE if name in fields}
        request = ExecutorRequest(
            request_id=request_id,
            prompt=np.asarray(prompt, np.int32),
            role=role,
            sampling=SamplingParams(**fields),
            seed_hash=seed_hash("contract"),
            sink=recorder,
            **beside,
        )
        self.executor.submit(request)
        return recorder

    def aggregated_tokens(self, prompt: list[int], **sampling: Any) -> list[int]:
        recorder = self.submit(prompt, **sampling)
        assert recorder.finish_reason() is FinishReason.LENGTH
        return recorder.tokens

    def settle(self) -> None:
        """Wait until every earlier command has taken effect: a later request has run to its end."""
        assert isinstance(self.submit([1], max_tokens=1).end(), Completed)

    def num_unheld_blocks(self) -> int:
        load = self.executor.load()
        return load.num_free_blocks + load.num_cached_blocks


def copy_missing_blocks(source: Executor, announced: list[int], target: Executor, reserved: Reserved) -> int:
    """What a transport does; returns the number of blocks moved."""
    assert source.layout.is_compatible(target.layout)
    size = source.layout.block_bytes
    pairs = list(zip(announced, reserved.block_ids, strict=True))[reserved.num_cached_blocks :]
    for remote, local in pairs:
        ctypes.memmove(
            target.pool_memory.base_address + local * size, source.pool_memory.base_address + remote * size, size
        )
    return len(pairs)
