"""What a batching engine refuses before it takes a request: what could never run, or would name KV wrongly."""

from __future__ import annotations

from kelp.core.errors import InvalidRequest, NotFound, PromptTooLong
from kelp.core.types import KVLayout, Role, num_blocks_for
from kelp.executor.base import ExecutorLimits, ExecutorRequest


def check_request(request: ExecutorRequest, limits: ExecutorLimits, layout: KVLayout) -> None:
    """Raise what `Executor.submit` promises for a request that is wrong in itself."""
    _check_adapter(request, limits)
    prompt, sampling = request.prompt, request.sampling
    if len(prompt) == 0:
        raise InvalidRequest("input_ids: the prompt is empty")
    if int(prompt.min()) < 0 or int(prompt.max()) >= limits.vocab_size:
        raise InvalidRequest(
            f"input_ids: ids between {prompt.min()} and {prompt.max()} given, the vocabulary has {limits.vocab_size}"
        )
    if not 0 <= request.num_generated < min(len(prompt), sampling.max_tokens):
        raise InvalidRequest(
            f"num_generated: {request.num_generated} given, must be below max_tokens {sampling.max_tokens} "
            f"and the {len(prompt)} tokens given"
        )
    num_onboardable = 0 if request.role is Role.DECODE else (len(prompt) - 1) // layout.block_size
    if not 0 <= request.onboard_blocks <= num_onboardable:
        raise InvalidRequest(
            f"onboard_blocks: {request.onboard_blocks} given, must be at most {num_onboardable} in role "
            f"{request.role.value} with {len(prompt)} tokens"
        )
    _check_room(request, limits, layout)


def _check_room(request: ExecutorRequest, limits: ExecutorLimits, layout: KVLayout) -> None:
    prompt, max_tokens = request.prompt, request.sampling.max_tokens
    num_tokens = len(prompt) + request.num_tokens_to_come
    if num_tokens > limits.max_model_tokens:
        raise PromptTooLong(
            f"prompt of {len(prompt)} tokens plus max_tokens {max_tokens} is {num_tokens}, "
            f"max_model_tokens is {limits.max_model_tokens}"
        )
    # The last token of a sequence is never an input, so its KV needs no room.
    num_positions = len(prompt) if request.role is Role.PREFILL else num_tokens - 1
    num_blocks = num_blocks_for(num_positions, layout.block_size)
    if num_blocks > layout.num_blocks:
        raise PromptTooLong(
            f"prompt of {len(prompt)} tokens plus max_tokens {max_tokens} needs {num_blocks} "
            f"KV blocks, executor.num_blocks is {layout.num_blocks}"
        )


def _check_adapter(request: ExecutorRequest, limits: ExecutorLimits) -> None:
    if not request.lora_name:
        return
    digest = limits.adapters.get(request.lora_name)
    if digest is None:
        known = ", ".join(limits.adapters) or "none"
        raise InvalidRequest(f"lora_name: {request.lora_name!r} given, this worker's adapters: {known}")
    if digest != request.lora_digest:
        raise NotFound(
            f"lora_name: this worker loaded another content of {request.lora_name!r} ({digest}) than the prompt's "
            f"blocks are named after ({request.lora_digest or 'none'})"
        )
