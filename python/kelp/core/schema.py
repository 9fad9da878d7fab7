"""The tensors of every model in `model_repository`: the one place where their names are written.

`core.schema_render` writes config.pbtxt from here; a graph test holds the files to it byte for byte.
"""

from __future__ import annotations

from kelp.core.schema_inputs import LLM_INPUTS
from kelp.core.schema_types import Datatype, ModelSchema, TensorSpec

_ANY_LENGTH = (-1,)

LLM_STEP_OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("text_output", Datatype.BYTES, _ANY_LENGTH),
    TensorSpec("output_ids", Datatype.INT32, _ANY_LENGTH),
    TensorSpec("output_log_probs", Datatype.FP32, _ANY_LENGTH),
    TensorSpec("sequence_index", Datatype.INT32, _ANY_LENGTH),
    TensorSpec("finish_reason", Datatype.BYTES, _ANY_LENGTH),
)
"""May be in every response; one element per sequence that the response tells of, tokens one sequence after another."""

LLM_LAST_OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("sequence_length", Datatype.INT32, _ANY_LENGTH),
    TensorSpec("cached_tokens", Datatype.INT32),
    TensorSpec("num_input_tokens", Datatype.UINT32),
    TensorSpec("num_output_tokens", Datatype.UINT32),
    TensorSpec("worker_ids", Datatype.BYTES, _ANY_LENGTH),
    TensorSpec("kv_cache_alloc_new_blocks", Datatype.INT32),
    TensorSpec("kv_cache_reused_blocks", Datatype.INT32),
    TensorSpec("kv_cache_alloc_total_blocks", Datatype.INT32),
    TensorSpec("arrival_time_ns", Datatype.INT64),
    TensorSpec("first_scheduled_time_ns", Datatype.INT64),
    TensorSpec("first_token_time_ns", Datatype.INT64),
    TensorSpec("last_token_time_ns", Datatype.INT64),
)
"""In the last response only; `sequence_length` in the last one of each sequence."""

LLM = ModelSchema(
    name="llm",
    backend="kelp_router",
    inputs=LLM_INPUTS,
    outputs=(*LLM_STEP_OUTPUTS, *LLM_LAST_OUTPUTS),
    is_decoupled=True,
)

PREPROCESS = ModelSchema(
    name="preprocess",
    backend="kelp_preprocess",
    inputs=(
        TensorSpec("text_input", Datatype.BYTES, optional=True),
        TensorSpec("messages", Datatype.BYTES, optional=True),
        TensorSpec("input_ids", Datatype.INT32, _ANY_LENGTH, optional=True),
        TensorSpec("options", Datatype.BYTES),
    ),
    outputs=(
        TensorSpec("input_ids", Datatype.INT32, _ANY_LENGTH),
        TensorSpec("block_hashes", Datatype.UINT8, _ANY_LENGTH),
        TensorSpec("prompt_text", Datatype.BYTES),
        TensorSpec("prepared", Datatype.BYTES),
    ),
    is_decoupled=False,
)
"""`options` and `prepared` are JSON (`core.preprocess_messages`); `block_hashes` has 16 bytes per full block."""

WORKER_INPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("command", Datatype.BYTES),
    TensorSpec("input_ids", Datatype.INT32, _ANY_LENGTH, optional=True),
)
WORKER_OUTPUTS: tuple[TensorSpec, ...] = (
    TensorSpec("output_ids", Datatype.INT32, _ANY_LENGTH),
    TensorSpec("output_log_probs", Datatype.FP32, _ANY_LENGTH),
    TensorSpec("event", Datatype.BYTES),
)
"""`command` is a WorkerCommand, `event` a Finished or WorkerStatus (`core.messages`), as JSON."""


def worker_schema(name: str, role: str) -> ModelSchema:
    """The model of one worker; `role` is `prefill` or `decode` and picks the backend."""
    return ModelSchema(name, f"kelp_{role}", WORKER_INPUTS, WORKER_OUTPUTS, is_decoupled=True)


KV_BLOCK_MANAGER = ModelSchema(
    name="kv_block_manager",
    backend="kelp_kv_block_manager",
    inputs=(TensorSpec("operations", Datatype.BYTES),),
    outputs=(TensorSpec("results", Datatype.BYTES),),
    is_decoupled=False,
)
"""A batch of operations and one result for each, MessagePack (`core.kv_manager_messages`); KV never passes here."""

MODEL_SCHEMAS: tuple[ModelSchema, ...] = (
    LLM,
    PREPROCESS,
    worker_schema("prefill", "prefill"),
    worker_schema("decode", "decode"),
    KV_BLOCK_MANAGER,
)
