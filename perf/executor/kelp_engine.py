"""kelp's executor as a worker drives it, detokenising included: `python -m perf.executor.kelp_engine OPTIONS`.

A token counts as arrived once its text is there. The configuration is the shipped one but for the size of the KV pool,
the threads and the draft tokens, which the suite decides.
"""

from __future__ import annotations

import itertools
import queue
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from kelp.core.config import ExecutorConfig
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import Role
from kelp.executor.base import Completed, Executor, ExecutorEvent, ExecutorRequest, Failed, Tokens
from kelp.executor.torch.load import load_torch_executor
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.text.detokenizer import new_detokenizer
from kelp.text.tokenizer import Tokenizer
from perf.executor.protocol import EngineOptions, Job, LoadedEngine, Recorder, serve, stored_bytes

_Events = queue.SimpleQueue[tuple[int, ExecutorEvent]]


class _Driver:
    """What a worker and a router do around the executor, without what lies between them."""

    def __init__(self, executor: Executor, tokenizer: Tokenizer) -> None:
        self._executor = executor
        self._tokenizer = tokenizer
        self._seed_hash = seed_hash(executor.layout.model_id)
        self._numbers = itertools.count()

    def run(self, job: Job, recorder: Recorder) -> None:
        events: _Events = queue.SimpleQueue()
        sampling = SamplingParams(max_tokens=job.max_tokens, ignore_eos=True)
        for index, prompt in enumerate(job.prompts):
            self._executor.submit(
                ExecutorRequest(
                    request_id=f"request-{next(self._numbers)}",
                    prompt=np.array(prompt, dtype=np.int32),
                    role=Role.AGGREGATED,
                    sampling=sampling,
                    seed_hash=self._seed_hash,
                    sink=partial(_hand_over, events, index),
                )
            )
        self._collect(events, recorder, len(job.prompts))

    def _collect(self, events: _Events, recorder: Recorder, num_open: int) -> None:
        detokenizers = [new_detokenizer(self._tokenizer) for _ in range(num_open)]
        while num_open:
            index, event = events.get()
            if isinstance(event, Tokens):
                detokenizers[index].push(event.token_ids)
                recorder.take(index, len(event.token_ids), time.monotonic())
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Completed):
                num_open -= 1


def _hand_over(events: _Events, index: int, event: ExecutorEvent) -> None:
    events.put((index, event))


def load(options: EngineOptions) -> LoadedEngine:
    folder = Path(options.model_folder)
    shipped = TorchExecutorOptions.from_config(ExecutorConfig(), device="cpu", threads=options.threads)
    chosen = replace(
        shipped,
        num_blocks=options.num_kv_tokens // shipped.block_size,
        num_draft_tokens=options.num_draft_tokens,
    )
    executor = load_torch_executor(folder, chosen)
    driver = _Driver(executor, Tokenizer(folder))
    return LoadedEngine(driver.run, stored_bytes(list(folder.glob("*.safetensors"))))


if __name__ == "__main__":
    serve(load)
