"""Hugging Face `transformers`, one static batch a job: `python -m perf.executor.transformers_engine OPTIONS`.

Token ids only: it is spared the detokenising.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from perf.executor.protocol import EngineOptions, Job, LoadedEngine, Recorder, serve, stored_bytes


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


def load(options: EngineOptions) -> LoadedEngine:
    torch.set_num_threads(options.threads)
    folder = Path(options.model_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def run(job: Job, recorder: Recorder) -> None:
        prompts = torch.tensor(job.prompts)
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=job.max_tokens,
            max_new_tokens=job.max_tokens,
            pad_token_id=0,
            streamer=_Arrivals(recorder),
        )

    return LoadedEngine(run, stored_bytes(list(folder.glob("*.safetensors"))))


if __name__ == "__main__":
    serve(load)
