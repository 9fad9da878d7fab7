"""The shape of a decoder-only model, whichever family it comes from.

Plain values: what they are read from is `model_config`'s business, what is computed with them the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Activation(Enum):
    """Non-linearity of the gated MLP, by transformers' name."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    """Frequency scaling of YaRN (https://arxiv.org/abs/2309.00071), as Qwen models use it.

    Attributes:
        attention_factor: Factor on cosines and sines.
        is_truncated: Whether the bounds of the ramp are whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding."""

    theta: float
    scaling: LinearRope | Llama3Rope | YarnRope | None = None


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of one MLP.

    Attributes:
        intermediate_size: Of each expert.
        is_normalized: Whether the weights of the chosen experts are scaled to add up to 1.
        is_rounded: Whether they are then rounded to the model's dtype (Qwen) or kept in fp32 (Mixtral).
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    is_normalized: bool
    is_rounded: bool


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer.

    Attributes:
        window: How many latest positions a token sees, itself included; None sees all.
        experts: None for a dense MLP.
    """

    rope: RopeConfig
    window: int | None = None
    experts: ExpertsConfig | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that the arithmetic depends on besides the weights.

    Attributes:
        attention_scale: Factor on query times key.
        has_qkv_bias: Query, key and value projections add a bias.
        has_output_bias: So does the attention's output projection.
        has_mlp_bias: So do the three projections of the MLP.
        has_qk_norm: Each query and key head is normalised before its rotation.
        has_post_norms: Attention and MLP outputs are normalised before they join the residual stream.
        has_offset_norms: Norms multiply by 1 + weight, in fp32.
        embedding_scale: Factor on token embeddings; None for none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    attention_scale: float
    max_position_embeddings: int
    has_tied_embeddings: bool
    activation: Activation = Activation.SILU
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    has_offset_norms: bool = False
    embedding_scale: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Length of `layers`."""
        return len(self.layers)
