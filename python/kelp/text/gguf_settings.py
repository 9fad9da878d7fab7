"""config.json from the metadata of a GGUF file.

What llama.cpp knows of an architecture without its being written in the file is repeated here. A field that would
change the arithmetic and is not understood is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kelp.core.errors import ConfigError

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_REFUSED_WHEN_SET = (
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_shared_count",
    "expert_weights_scale",
    "final_logit_softcapping",
    "leading_dense_block_count",
    "logit_scale",
    "residual_scale",
    "rope.scale_linear",
)
_SOFTMAX_GATING = 1
_GEMMA3_PATTERN = 6
_GEMMA3_27B_LAYERS = 62


class _Fields:
    """The architecture's own metadata, reached without its prefix."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.prefix = str(metadata.get("general.architecture"))
        known = sorted(set(_CLASSES) - {"mixtral"})
        if self.prefix not in known:
            raise ConfigError(f"general.architecture: {self.prefix!r} is not one of {', '.join(known)}")
        self._metadata = metadata
        for field in _REFUSED_WHEN_SET:
            if self.get(field, 0):
                raise self.refusal(field)

    @property
    def family(self) -> str:
        """The architecture, with Mixtral told from Llama: llama.cpp gives both one name."""
        is_mixture = self.prefix == "llama" and self.get("expert_count", 0)
        return "mixtral" if is_mixture else self.prefix

    def get(self, field: str, default: Any) -> Any:
        return self._metadata.get(f"{self.prefix}.{field}", default)

    def need(self, field: str) -> Any:
        value = self.get(field, None)
        if value is None:
            raise ConfigError(f"{self.prefix}.{field}: missing in the GGUF metadata")
        return value

    def need_int(self, field: str) -> int:
        value = self.need(field)
        if not isinstance(value, int):
            # Such as head counts that differ from layer to layer.
            raise self.refusal(field)
        return value

    def refusal(self, field: str) -> ConfigError:
        value = self.get(field, None)
        return ConfigError(f"{self.prefix}.{field}: {value!r} is not supported; use the model's Hugging Face folder")


def model_family(metadata: Mapping[str, Any]) -> str:
    """`llama`, `mixtral`, `qwen2`, `qwen3`, `qwen3moe` or `gemma3`.

    Raises:
        ConfigError: Another architecture; names it.
    """
    return _Fields(metadata).family


def model_settings(metadata: Mapping[str, Any], vocab_size: int, tensor_names: Collection[str]) -> dict[str, Any]:
    """Content of config.json.

    Args:
        metadata: GGUF keys and values.
        vocab_size: Rows of the embedding, which may exceed the vocabulary.
        tensor_names: As the file has them: whether there are biases or an output projection is said nowhere else.

    Raises:
        ConfigError: Unsupported architecture or field, or a missing field; names it.
    """
    fields = _Fields(metadata)
    model_type, class_name = _CLASSES[fields.family]
    num_heads = fields.need_int("attention.head_count")
    hidden_size = fields.need_int("embedding_length")
    head_dim = _head_dim(fields, hidden_size // num_heads)
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": fields.need_int("feed_forward_length"),
        "num_hidden_layers": fields.need_int("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(fields.get("attention.head_count_kv", num_heads)),
        "head_dim": head_dim,
        "max_position_embeddings": fields.need_int("context_length"),
        # GGUF stores float32; six digits give back the decimal that was meant (1e-05).
        "rms_norm_eps": float(f"{fields.need('attention.layer_norm_rms_epsilon'):.6g}"),
        "attention_bias": fields.family != "qwen2" and "blk.0.attn_q.bias" in tensor_names,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        **_rope(fields),
        **_family_settings(fields, hidden_size // num_heads, head_dim, tensor_names),
    }


def _head_dim(fields: _Fields, even_share: int) -> int:
    head_dim = int(fields.get("attention.key_length", even_share))
    for field in ("attention.value_length", "rope.dimension_count"):
        if fields.get(field, head_dim) != head_dim:
            raise fields.refusal(field)
    return head_dim


def _rope(fields: _Fields) -> dict[str, Any]:
    theta = float(fields.get("rope.freq_base", 1e6 if fields.family == "gemma3" else 1e4))
    scaling = fields.get("rope.scaling.type", "none")
    if scaling == "none":
        return {"rope_theta": theta}
    if scaling != "linear":
        raise fields.refusal("rope.scaling.type")
    factor = float(fields.need("rope.scaling.factor"))
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "linear", "factor": factor}}


def _family_settings(fields: _Fields, even_share: int, head_dim: int, tensor_names: Collection[str]) -> dict[str, Any]:
    if fields.family == "gemma3":
        # llama.cpp recognises the 27B model, whose scale differs, by its number of layers.
        is_27b = fields.need_int("block_count") == _GEMMA3_27B_LAYERS
        return {**_gemma3_layers(fields), "query_pre_attn_scalar": even_share if is_27b else head_dim}
    if fields.get("attention.sliding_window", 0):
        raise fields.refusal("attention.sliding_window")
    if fields.family == "mixtral":
        own: dict[str, Any] = {"num_local_experts": fields.need_int("expert_count"), **_num_chosen(fields)}
        return {**own, "hidden_act": "silu", "sliding_window": None}
    if fields.family == "qwen3moe":
        return {**_qwen3_experts(fields), "hidden_act": "silu"}
    if fields.family == "llama":
        return {"hidden_act": "silu", "mlp_bias": "blk.0.ffn_gate.bias" in tensor_names}
    return {"hidden_act": "silu", "use_sliding_window": False}


def _gemma3_layers(fields: _Fields) -> dict[str, Any]:
    settings = {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": float(fields.get("rope.freq_base_swa", 1e4)),
        "sliding_window": fields.get("attention.sliding_window", None),
    }
    num_layers = fields.need_int("block_count")
    pattern = fields.get("attention.sliding_window_pattern", _GEMMA3_PATTERN)
    if isinstance(pattern, int):
        is_sliding = [(index + 1) % pattern != 0 for index in range(num_layers)]
    else:
        is_sliding = [bool(sliding) for sliding in pattern]
    if not settings["sliding_window"]:
        is_sliding = [False] * num_layers
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding]
    return {**settings, "layer_types": kinds}


def _num_chosen(fields: _Fields) -> dict[str, int]:
    if fields.get("expert_gating_func", _SOFTMAX_GATING) not in (0, _SOFTMAX_GATING):
        raise fields.refusal("expert_gating_func")
    return {"num_experts_per_tok": fields.need_int("expert_used_count")}


def _qwen3_experts(fields: _Fields) -> dict[str, Any]:
    return {
        "num_experts": fields.need_int("expert_count"),
        **_num_chosen(fields),
        "moe_intermediate_size": fields.need_int("expert_feed_forward_length"),
        "norm_topk_prob": bool(fields.get("expert_weights_norm", True)),
    }
