"""Which checkpoint tensors make up a decoder, fused as the forward pass wants them.

Reads one part at a time and keeps nothing: what is done with a part, and when its raw tensors may go, is the
caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kelp.executor.torch.decoder_config import DecoderConfig, ExpertsConfig
from kelp.executor.torch.tensor_files import TensorFiles


@dataclass(frozen=True, slots=True)
class Projection:
    """`weight` `[out, in]`, several of them stacked along `out`; `bias` `[out]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """One gated MLP; `gate_up` is gate, then up."""

    gate_up: Projection
    down: Projection


class Checkpoint:
    """Tensors by their role, converted and placed.

    Every method raises `ConfigError` naming a tensor that is missing or of another shape than config.json says.
    """

    def __init__(self, files: TensorFiles, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._files = files
        self._config = config
        self._dtype = dtype
        self._device = device

    def embedding(self) -> torch.Tensor:
        """`[vocab_size, hidden_size]`."""
        return self._get("model.embed_tokens.weight", self._config.vocab_size, self._config.hidden_size)

    def lm_head(self) -> torch.Tensor:
        """`[vocab_size, hidden_size]`; for models whose embeddings are not tied."""
        return self._get("lm_head.weight", self._config.vocab_size, self._config.hidden_size)

    def final_norm(self) -> torch.Tensor:
        """`[hidden_size]`."""
        return self._get("model.norm.weight", self._config.hidden_size)

    def layer_norm(self, layer: int, name: str) -> torch.Tensor:
        """`[hidden_size]`, by its name in the checkpoint."""
        return self._get(f"model.layers.{layer}.{name}.weight", self._config.hidden_size)

    def head_norm(self, layer: int, name: str) -> torch.Tensor:
        """`[head_dim]`, by its name in the checkpoint."""
        return self._get(f"model.layers.{layer}.self_attn.{name}.weight", self._config.head_dim)

    def qkv(self, layer: int) -> Projection:
        """Query, key and value projection."""
        config = self._config
        prefix = f"model.layers.{layer}.self_attn"
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = [
            self._projection(f"{prefix}.q_proj", query_size, config.hidden_size, config.has_qkv_bias),
            self._projection(f"{prefix}.k_proj", kv_size, config.hidden_size, config.has_qkv_bias),
            self._projection(f"{prefix}.v_proj", kv_size, config.hidden_size, config.has_qkv_bias),
        ]
        return _stack(parts)

    def attention_out(self, layer: int) -> Projection:
        """Output projection of the attention."""
        config = self._config
        name = f"model.layers.{layer}.self_attn.o_proj"
        return self._projection(name, config.hidden_size, config.num_heads * config.head_dim, config.has_output_bias)

    def mlp(self, layer: int) -> MlpWeights:
        """The layer's dense MLP."""
        prefix = f"model.layers.{layer}.mlp"
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj")
        return self._mlp(names, self._config.intermediate_size, self._config.has_mlp_bias)

    def router(self, layer: int, experts: ExpertsConfig) -> torch.Tensor:
        """`[num_experts, hidden_size]`."""
        return self._get(f"{self._experts_prefix(layer)}.gate.weight", experts.num_experts, self._config.hidden_size)

    def expert(self, layer: int, index: int, experts: ExpertsConfig) -> MlpWeights:
        """One expert, whichever way the checkpoint holds it: by itself, or as a slice of all."""
        prefix = f"{self._experts_prefix(layer)}.experts"
        if f"{prefix}.gate_up_proj" in self._files:
            count, inner, hidden = experts.num_experts, experts.intermediate_size, self._config.hidden_size
            gate_up = self._files.get(f"{prefix}.gate_up_proj", count, 2 * inner, hidden)[index]
            down = self._files.get(f"{prefix}.down_proj", count, hidden, inner)[index]
            return MlpWeights(Projection(self._placed(gate_up)), Projection(self._placed(down)))
        own = f"{prefix}.{index}"
        names = (f"{own}.gate_proj", f"{own}.up_proj", f"{own}.down_proj")
        if f"{own}.w1.weight" in self._files:
            names = (f"{own}.w1", f"{own}.w3", f"{own}.w2")
        return self._mlp(names, experts.intermediate_size, has_bias=False)

    def _experts_prefix(self, layer: int) -> str:
        """Mixtral's checkpoints have a name of their own."""
        mixtral = f"model.layers.{layer}.block_sparse_moe"
        return mixtral if f"{mixtral}.gate.weight" in self._files else f"model.layers.{layer}.mlp"

    def _mlp(self, names: tuple[str, str, str], inner: int, has_bias: bool) -> MlpWeights:
        gate, up, down = names
        hidden = self._config.hidden_size
        parts = [self._projection(name, inner, hidden, has_bias) for name in (gate, up)]
        return MlpWeights(_stack(parts), self._projection(down, hidden, inner, has_bias))

    def _projection(self, name: str, num_out: int, num_in: int, has_bias: bool) -> Projection:
        weight = self._get(f"{name}.weight", num_out, num_in)
        return Projection(weight, self._get(f"{name}.bias", num_out) if has_bias else None)

    def _get(self, name: str, *shape: int) -> torch.Tensor:
        return self._placed(self._files.get(name, *shape))

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype)


def _stack(parts: list[Projection]) -> Projection:
    biases = [part.bias for part in parts if part.bias is not None]
    return Projection(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)
