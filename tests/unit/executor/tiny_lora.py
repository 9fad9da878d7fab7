"""A tiny random model with random LoRA adapters, saved and computed by transformers and PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_llama import VOCAB_SIZE, Answer, Rig
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from kelp.executor.base import Tokens

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_MODULES = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def save_qwen2(folder: Path) -> PreTrainedModel:
    fields = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def save_mixtral(folder: Path) -> PreTrainedModel:
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def adapter(**fields: object) -> LoraConfig:
    """An adapter whose two matrices are both random, unlike those at the start of a training."""
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL_MODULES, "init_lora_weights": False, **fields})


@dataclass(frozen=True)
class AdaptedModel:
    """One base model and its adapters, on disk and in PEFT."""

    folder: Path
    adapters: dict[str, Path]
    peft: PeftModel

    @classmethod
    def save(cls, model: PreTrainedModel, folder: Path, configs: dict[str, LoraConfig]) -> AdaptedModel:
        """Args: `folder` holds the base model already."""
        torch.manual_seed(11)
        (first, config), *others = configs.items()
        peft = get_peft_model(model, config, adapter_name=first)
        for name, other in others:
            peft.add_adapter(name, other)
        peft.save_pretrained(folder / "adapters", selected_adapters=list(configs))
        return cls(folder, {name: folder / "adapters" / name for name in configs}, peft.eval())

    def rig(self, **options: object) -> Rig:
        return Rig(self.folder, lora_adapters=self.adapters, **options)

    @torch.inference_mode()
    def expected(self, lora_name: str, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        history, log_probs = list(prompt), []
        with self.active(lora_name):
            for _ in range(num_tokens):
                steps = torch.log_softmax(self.peft(torch.tensor([history])).logits[0, -1], dim=-1)
                history.append(int(steps.argmax()))
                log_probs.append(float(steps.max()))
        return history[len(prompt) :], log_probs

    @contextmanager
    def active(self, lora_name: str) -> Iterator[None]:
        if not lora_name:
            with self.peft.disable_adapter():
                yield
        else:
            self.peft.set_adapter(lora_name)
            yield


def log_probs(answer: Answer) -> list[float]:
    return [log_prob for event in answer.of(Tokens) for log_prob in event.log_probs]
