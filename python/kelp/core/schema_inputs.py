"""The inputs of `llm`: the names of the TensorRT-LLM and vLLM backends plus kelp's own.

Sources: TensorRT-LLM triton_backend/all_models/inflight_batcher_llm (`ensemble`, `tensorrt_llm_bls`,
`tensorrt_llm`) and vllm_backend's src/model.py. What each field means is decided in `core.request*`.
"""

from __future__ import annotations

from kelp.core.schema_types import Datatype, InputUse, TensorSpec

_ANY_LENGTH = (-1,)


def _used(name: str, datatype: Datatype, dims: tuple[int, ...] = (1,)) -> TensorSpec:
    return TensorSpec(name, datatype, dims, optional=True)


def _alias(name: str, datatype: Datatype, alias_of: str) -> TensorSpec:
    return TensorSpec(name, datatype, optional=True, use=InputUse.ALIAS, alias_of=alias_of)


def _neutral(
    name: str, datatype: Datatype, *neutral: bool | int | float | str, dims: tuple[int, ...] = (1,)
) -> TensorSpec:
    return TensorSpec(name, datatype, dims, optional=True, use=InputUse.NEUTRAL_ONLY, neutral=neutral)


def _no_effect(name: str, datatype: Datatype) -> TensorSpec:
    return TensorSpec(name, datatype, optional=True, use=InputUse.NO_EFFECT)


PROMPT_INPUTS: tuple[TensorSpec, ...] = (
    _used("text_input", Datatype.BYTES),
    _used("messages", Datatype.BYTES),
    _used("input_ids", Datatype.INT32, _ANY_LENGTH),
    _used("input_lengths", Datatype.INT32),
)
"""Exactly one of the first three is not empty; they are optional for Triton because it cannot say so."""

SAMPLING_INPUTS: tuple[TensorSpec, ...] = (
    _used("max_tokens", Datatype.INT32),
    _alias("request_output_len", Datatype.INT32, "max_tokens"),
    _used("min_tokens", Datatype.INT32),
    _alias("min_length", Datatype.INT32, "min_tokens"),
    _used("temperature", Datatype.FP32),
    _used("top_k", Datatype.INT32),
    _used("top_p", Datatype.FP32),
    _used("min_p", Datatype.FP32),
    _used("repetition_penalty", Datatype.FP32),
    _used("presence_penalty", Datatype.FP32),
    _used("frequency_penalty", Datatype.FP32),
    _used("random_seed", Datatype.UINT64),
    _alias("seed", Datatype.UINT64, "random_seed"),
    _used("end_id", Datatype.INT32),
    _used("ignore_eos", Datatype.BOOL),
    _used("stop_words", Datatype.BYTES, _ANY_LENGTH),
    _used("bad_words", Datatype.BYTES, _ANY_LENGTH),
    _used("num_return_sequences", Datatype.INT32),
    _used("guided_decoding_guide_type", Datatype.BYTES),
    _used("guided_decoding_guide", Datatype.BYTES),
    _used("sampling_parameters", Datatype.BYTES),
)

REQUEST_INPUTS: tuple[TensorSpec, ...] = (
    _used("stream", Datatype.BOOL),
    _alias("streaming", Datatype.BOOL, "stream"),
    _used("return_log_probs", Datatype.BOOL),
    _used("exclude_input_in_output", Datatype.BOOL),
    _used("return_finish_reason", Datatype.BOOL),
    _used("return_num_input_tokens", Datatype.BOOL),
    _used("return_num_output_tokens", Datatype.BOOL),
    _used("lora_name", Datatype.BYTES),
    _used("cache_salt", Datatype.BYTES),
    _used("session_id", Datatype.BYTES),
    _used("priority", Datatype.INT32),
    _used("deadline_ms", Datatype.INT32),
    _no_effect("return_perf_metrics", Datatype.BOOL),
    _no_effect("pad_id", Datatype.INT32),
)
"""Performance metrics are always returned, and sequences are never padded: those two change nothing."""

_DEFAULT_RETENTION_PRIORITY = 35
"""TensorRT-LLM's KvCacheRetentionConfig default."""

UNSUPPORTED_INPUTS: tuple[TensorSpec, ...] = (
    _neutral("beam_width", Datatype.INT32, 0, 1),
    _neutral("length_penalty", Datatype.FP32, 0.0, 1.0),
    _neutral("decoder_text_input", Datatype.BYTES, ""),
    _neutral("return_context_logits", Datatype.BOOL, False),
    _neutral("return_generation_logits", Datatype.BOOL, False),
    _neutral("return_logprobs", Datatype.BOOL, False),
    _neutral("return_cumulative_logprob", Datatype.BOOL, False),
    _neutral("embedding_request", Datatype.BYTES, ""),
    _neutral("embedding_bias_words", Datatype.BYTES, "", dims=_ANY_LENGTH),
    _neutral("embedding_bias_weights", Datatype.FP32, 0.0, 1.0, dims=_ANY_LENGTH),
    _neutral("prompt_embedding_table", Datatype.FP16, dims=(-1, -1)),
    _neutral("prompt_vocab_size", Datatype.INT32, 0),
    _neutral("prompt_table_extra_id", Datatype.UINT64, 0),
    _neutral("lora_task_id", Datatype.UINT64, 0),
    _neutral("lora_weights", Datatype.FP16, dims=(-1, -1)),
    _neutral("lora_config", Datatype.INT32, dims=(-1, 3)),
    _neutral("image", Datatype.BYTES, "", dims=_ANY_LENGTH),
    _neutral("image_input", Datatype.FP16, dims=(-1, 3, -1, -1)),
    _neutral("image_bytes_input", Datatype.UINT8, dims=(-1, -1, -1, -1)),
    _neutral("image_url_input", Datatype.BYTES, ""),
    _neutral("video_bytes_input", Datatype.UINT8, dims=(-1, -1, -1, -1)),
    _neutral("num_draft_tokens", Datatype.INT32, 0),
    _neutral("use_draft_logits", Datatype.BOOL, False),
    _neutral("draft_input_ids", Datatype.INT32, dims=_ANY_LENGTH),
    _neutral("context_phase_params", Datatype.UINT8, dims=_ANY_LENGTH),
    _neutral("retention_token_range_starts", Datatype.INT32, dims=_ANY_LENGTH),
    _neutral("retention_token_range_ends", Datatype.INT32, dims=_ANY_LENGTH),
    _neutral("retention_token_range_priorities", Datatype.INT32, dims=_ANY_LENGTH),
    _neutral("retention_token_range_durations_ms", Datatype.INT32, dims=_ANY_LENGTH),
    _neutral("retention_decode_priority", Datatype.INT32, _DEFAULT_RETENTION_PRIORITY),
    _neutral("retention_decode_duration_ms", Datatype.INT32, -1, 0),
)

LLM_INPUTS: tuple[TensorSpec, ...] = (
    *PROMPT_INPUTS,
    *SAMPLING_INPUTS,
    *REQUEST_INPUTS,
    *UNSUPPORTED_INPUTS,
)
LLM_INPUTS_BY_NAME: dict[str, TensorSpec] = {spec.name: spec for spec in LLM_INPUTS}
