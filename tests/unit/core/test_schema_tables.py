"""The table of tensors agrees with itself and with the published names."""

from __future__ import annotations

import pytest

from kelp.core.schema import LLM, MODEL_SCHEMAS
from kelp.core.schema_inputs import LLM_INPUTS, LLM_INPUTS_BY_NAME
from kelp.core.schema_types import InputUse

PUBLISHED_INPUTS = {
    "text_input": "BYTES", "messages": "BYTES", "input_ids": "INT32", "max_tokens": "INT32", "stream": "BOOL",
    "temperature": "FP32", "top_p": "FP32", "min_p": "FP32", "repetition_penalty": "FP32",
    "presence_penalty": "FP32", "frequency_penalty": "FP32", "top_k": "INT32", "min_tokens": "INT32",
    "min_length": "INT32", "end_id": "INT32", "num_return_sequences": "INT32", "random_seed": "UINT64",
    "stop_words": "BYTES", "bad_words": "BYTES", "return_log_probs": "BOOL", "ignore_eos": "BOOL",
    "exclude_input_in_output": "BOOL", "guided_decoding_guide_type": "BYTES", "guided_decoding_guide": "BYTES",
    "lora_name": "BYTES", "cache_salt": "BYTES", "session_id": "BYTES", "priority": "INT32",
    "deadline_ms": "INT32", "sampling_parameters": "BYTES", "return_finish_reason": "BOOL",
    "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL",
}  # fmt: skip
TENSORRT_LLM_INPUTS = {
    "decoder_text_input", "image_input", "image_bytes_input", "image_url_input", "video_bytes_input", "pad_id",
    "length_penalty", "seed", "return_context_logits", "return_generation_logits", "beam_width",
    "prompt_embedding_table", "prompt_vocab_size", "prompt_table_extra_id", "embedding_bias_words",
    "embedding_bias_weights", "num_draft_tokens", "use_draft_logits", "lora_task_id", "lora_weights",
    "lora_config", "return_perf_metrics", "input_lengths", "request_output_len", "streaming",
    "draft_input_ids", "context_phase_params", "retention_token_range_starts", "retention_token_range_ends",
    "retention_token_range_priorities", "retention_token_range_durations_ms", "retention_decode_priority",
    "retention_decode_duration_ms",
}  # fmt: skip
VLLM_INPUTS = {"image", "return_cumulative_logprob", "return_logprobs", "embedding_request"}
PUBLISHED_OUTPUTS = {
    "text_output": ("BYTES", (-1,)), "output_ids": ("INT32", (-1,)), "output_log_probs": ("FP32", (-1,)),
    "sequence_index": ("INT32", (-1,)), "finish_reason": ("BYTES", (-1,)), "sequence_length": ("INT32", (-1,)),
    "cached_tokens": ("INT32", (1,)), "num_input_tokens": ("UINT32", (1,)),
    "num_output_tokens": ("UINT32", (1,)), "worker_ids": ("BYTES", (-1,)),
    "kv_cache_alloc_new_blocks": ("INT32", (1,)), "kv_cache_reused_blocks": ("INT32", (1,)),
    "kv_cache_alloc_total_blocks": ("INT32", (1,)), "arrival_time_ns": ("INT64", (1,)),
    "first_scheduled_time_ns": ("INT64", (1,)), "first_token_time_ns": ("INT64", (1,)),
    "last_token_time_ns": ("INT64", (1,)),
}  # fmt: skip


def test_llm_declares_every_published_input_with_its_type():
    declared = {name: LLM_INPUTS_BY_NAME[name].datatype.value for name in PUBLISHED_INPUTS}
    assert declared == PUBLISHED_INPUTS


def test_llm_declares_every_input_of_the_other_backends():
    assert set(LLM_INPUTS_BY_NAME) >= TENSORRT_LLM_INPUTS | VLLM_INPUTS


def test_llm_declares_the_published_outputs_and_no_others():
    assert {spec.name: (spec.datatype.value, spec.dims) for spec in LLM.outputs} == PUBLISHED_OUTPUTS


def test_triton_never_refuses_a_request_to_llm_for_a_missing_input():
    assert all(spec.optional for spec in LLM_INPUTS)


@pytest.mark.parametrize("schema", MODEL_SCHEMAS, ids=lambda schema: schema.name)
def test_no_model_names_a_tensor_twice(schema):
    for specs in (schema.inputs, schema.outputs):
        names = [spec.name for spec in specs]
        assert sorted(set(names)) == sorted(names)


def test_an_alias_has_the_type_and_shape_of_the_used_input_it_renames():
    aliases = [spec for spec in LLM_INPUTS if spec.use is InputUse.ALIAS]
    assert aliases
    for spec in aliases:
        target = LLM_INPUTS_BY_NAME[spec.alias_of]
        assert (target.use, target.datatype, target.dims) == (InputUse.USED, spec.datatype, spec.dims)


def test_a_scalar_that_is_refused_unless_neutral_has_a_neutral_value():
    refused = [spec for spec in LLM_INPUTS if spec.use is InputUse.NEUTRAL_ONLY and spec.is_scalar]
    assert refused
    assert all(spec.neutral for spec in refused)
