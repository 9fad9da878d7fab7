"""The reference: `transformers` generating the same prompts greedily, in static batches, in a process of its own.

The parent holds a `TransformersReference`; the child is this module run with the model's folder, one JSON document a
line in and out, so that the weights are loaded once and rounds can alternate with those of kelp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.machine import REPOSITORY
from perf.suite import BenchError

NAME = "transformers generate"
_TIMEOUT_S = 200.0


@dataclass(frozen=True, slots=True)
class Batches:
    """Prompts to be generated `batch_size` at a time."""

    prompts: tuple[str, ...]
    batch_size: int
    max_tokens: int


class TransformersReference:
    """The parent's side."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def wait_ready(self) -> None:
        """Wait for the weights.

        Raises:
            BenchError: The child died, quoting its last words, or is silent for too long.
        """
        self._read()

    def tokens_per_s(self, batches: Batches) -> float:
        """Generate and measure.

        Raises:
            BenchError: The child died, quoting its last words, or is silent for too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(batches)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BenchError(self._last_words()) from None
        return float(self._read()["tokens_per_s"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # One answer is in flight at a time, so nothing readable ever hides in the buffer of the pipe.
        readable, _, _ = select.select([self._process.stdout], [], [], _TIMEOUT_S)
        if not readable:
            raise BenchError(f"{NAME}: silent for {_TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(self._last_words())
        return dict(json.loads(line))

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() or ["no output"]
        return f"{NAME}: {lines[-1][:300]}"


@contextmanager
def running(model_folder: Path, logs: Path) -> Iterator[TransformersReference]:
    """Keep the reference's process while the block runs; it starts loading at once."""
    log = logs / "transformers.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "perf.serving.transformers_reference", str(model_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=REPOSITORY,
        )
    try:
        yield TransformersReference(process, log)
    finally:
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()


def _generate(model: Any, tokenizer: Any, prompts: list[str], max_tokens: int) -> int:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=max_tokens,
        max_new_tokens=max_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return int(len(prompts) * (output.shape[1] - inputs["input_ids"].shape[1]))


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    _generate(model, tokenizer, ["warm up"], 2)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        batches = json.loads(line)
        prompts, size = batches["prompts"], batches["batch_size"]
        started_s = time.monotonic()
        tokens = sum(
            _generate(model, tokenizer, prompts[index : index + size], batches["max_tokens"])
            for index in range(0, len(prompts), size)
        )
        print(json.dumps({"tokens_per_s": tokens / (time.monotonic() - started_s)}), flush=True)


if __name__ == "__main__":
    main()
