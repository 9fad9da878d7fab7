"""Who takes part on the GPU, all in this process: kelp's executor, transformers, and a plain copy of memory.

Token ids in, token ids out: nobody detokenises here.
"""

from __future__ import annotations

import itertools
import queue
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from kelp.core.errors import KelpError
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import Role
from kelp.executor.base import Completed, ExecutorEvent, ExecutorRequest, Failed, Tokens
from kelp.executor.torch.load import load_torch_executor
from kelp.executor.torch.options import TorchExecutorOptions
from perf.executor.protocol import Job, Recorder, Turn
from perf.gpu.workloads import MAX_MODEL_TOKENS, MAX_RUNNING
from perf.stats import median
from perf.suite import BenchError

DEVICE = "cuda:0"
_BLOCK_SIZE = 16
_MAX_STEP_TOKENS = 2048
_POOL_TOKENS = 64 * 1024
_TIMEOUT_S = 120.0
_COPY_BYTES = 2**30
_NUM_COPIES = 10

_Events = queue.SimpleQueue[tuple[int, ExecutorEvent]]


def write_random_model(folder: Path) -> None:
    """A Llama of the shape of a 1B model in bf16, its weights drawn from a fixed seed; 2.5 GB."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=MAX_MODEL_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )
    torch.manual_seed(20261121)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()


class KelpOnDevice:
    """The executor as a worker drives it."""

    def __init__(self, folder: Path) -> None:
        options = TorchExecutorOptions(
            device=DEVICE,
            block_size=_BLOCK_SIZE,
            num_blocks=_POOL_TOKENS // _BLOCK_SIZE,
            max_model_tokens=MAX_MODEL_TOKENS,
            max_step_tokens=_MAX_STEP_TOKENS,
            max_running=MAX_RUNNING,
        )
        try:
            self._executor = load_torch_executor(folder, options)
        except KelpError as error:
            raise BenchError(f"kelp: {error}") from error
        self._seed_hash = seed_hash(self._executor.layout.model_id)
        self._numbers = itertools.count()

    def run(self, job: Job) -> Turn:
        """Do a job.

        Raises:
            BenchError: A request failed, or nothing came for too long.
        """
        events: _Events = queue.SimpleQueue()
        recorder = Recorder(len(job.prompts))
        start_s = time.monotonic()
        for index, prompt in enumerate(job.prompts):
            request = ExecutorRequest(
                request_id=f"request-{next(self._numbers)}",
                prompt=np.array(prompt, dtype=np.int32),
                role=Role.AGGREGATED,
                sampling=SamplingParams(max_tokens=job.max_tokens, ignore_eos=True),
                seed_hash=self._seed_hash,
                sink=partial(_hand_over, events, index),
            )
            self._executor.submit(request)
        _collect(events, recorder, len(job.prompts))
        return Turn(start_s, recorder.sequences(), peak_rss_bytes=0)

    def close(self) -> None:
        """End the engine."""
        self._executor.close()


def _hand_over(events: _Events, index: int, event: ExecutorEvent) -> None:
    events.put((index, event))


def _collect(events: _Events, recorder: Recorder, num_open: int) -> None:
    while num_open:
        try:
            index, event = events.get(timeout=_TIMEOUT_S)
        except queue.Empty:
            raise BenchError(f"kelp: silent for {_TIMEOUT_S} s") from None
        if isinstance(event, Tokens):
            recorder.take(index, len(event.token_ids), time.monotonic())
        elif isinstance(event, Failed):
            raise BenchError(f"kelp: {event.error}")
        elif isinstance(event, Completed):
            num_open -= 1


class _Arrivals(BaseStreamer):
    """Sees every step's tokens; the first thing that it is given is the prompt."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        now_s = time.monotonic()
        if not self._is_prompt:
            for index in range(value.shape[0]):
                self._recorder.take(index, 1, now_s)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is kept back."""


class TransformersOnDevice:
    """`generate` on one static batch."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)

    @property
    def weights_bytes(self) -> int:
        """Of all parameters, tied ones once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())

    @property
    def vocab_size(self) -> int:
        """Of the model."""
        return int(self._model.config.vocab_size)

    def run(self, job: Job) -> Turn:
        """Do a job.

        Raises:
            BenchError: The device refused, most likely for lack of memory.
        """
        recorder = Recorder(len(job.prompts))
        start_s = time.monotonic()
        prompts = torch.tensor(job.prompts, device=DEVICE)
        try:
            self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=job.max_tokens,
                max_new_tokens=job.max_tokens,
                pad_token_id=0,
                streamer=_Arrivals(recorder),
            )
        except RuntimeError as error:
            raise BenchError(f"transformers: {error}") from error
        return Turn(start_s, recorder.sequences(), peak_rss_bytes=0)


def copy_bytes_per_s() -> float:
    """Bytes read plus bytes written by a copy within the device's memory; the median of a few."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found = []
    for _ in range(_NUM_COPIES):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        found.append(2 * _COPY_BYTES / (time.perf_counter() - started_s))
    return median(found)
