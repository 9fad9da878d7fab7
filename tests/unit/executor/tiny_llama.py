"""A seeded random Llama as transformers saves it, transformers' own greedy answer, and an engine without a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kelp.core.clock import FakeClock
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, Failed, Prefilled, Reserved, Tokens
from kelp.executor.batching.engine import Engine
from kelp.executor.batching.executor import BatchingExecutorParts
from kelp.executor.torch.load import load_parts
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.kv.pool import BlockPool

VOCAB_SIZE = 160
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def save_model(folder: Path, **overrides: object) -> LlamaForCausalLM:
    """Write a two-layer fp32 model with grouped heads into `folder`."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **overrides})).eval()
    model.save_pretrained(folder)
    return model


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_tokens).tolist()


@torch.inference_mode()
def reference_tokens(model: LlamaForCausalLM, prompt: Sequence[int], num_tokens: int) -> list[int]:
    history = list(prompt)
    for _ in range(num_tokens):
        history.append(int(model(torch.tensor([history])).logits[0, -1].argmax()))
    return history[len(prompt) :]


@dataclass
class Answer:
    events: list[ExecutorEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.of(Tokens) for token in event.token_ids]

    @property
    def end(self) -> ExecutorEvent | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], Completed | Failed) else None

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def reserved(self) -> Reserved:
        (event,) = self.of(Reserved)
        return event

    @property
    def announced(self) -> list[int]:
        return [block_id for event in self.of(Prefilled) for block_id in event.block_ids]


class Rig:
    """Engine, pool and parts of one executor, stepped by hand."""

    def __init__(self, folder: Path, **options: object) -> None:
        defaults = {"dtype": "float32", "block_size": 4, "num_blocks": 64, "max_step_tokens": 64, "threads": 1}
        self.parts: BatchingExecutorParts = load_parts(folder, TorchExecutorOptions(**{**defaults, **options}))
        self.pool = BlockPool(self.parts.layout.num_blocks)
        self.engine = Engine(self.parts.runner, self.pool, self.parts.rules, FakeClock())
        self.num_submitted = 0

    @property
    def kv(self) -> torch.Tensor:
        owner = self.parts.memory.owner
        assert isinstance(owner, torch.Tensor)
        return owner

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        role: Role = Role.AGGREGATED,
        lora_name: str = "",
        **sampling: object,
    ) -> Answer:
        answer = Answer()
        request = ExecutorRequest(
            request_id=str(self.num_submitted),
            prompt=np.asarray(prompt, np.int32),
            role=role,
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
            seed_hash=seed_hash("tiny", lora_name),
            sink=answer.events.append,
            lora_name=lora_name,
        )
        self.num_submitted += 1
        self.engine.add(request, 1)
        return answer

    def run(self) -> None:
        while self.engine.step():
            self.pool.check_integrity()

    def answer(self, prompt: Sequence[int], max_tokens: int, **sampling: object) -> Answer:
        answer = self.submit(prompt, max_tokens, **sampling)
        self.run()
        return answer
