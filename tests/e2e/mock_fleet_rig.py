"""Servers of mock workers: what is asked of them, what they must answer, and what their routers say about it."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kelp.executor.mock.language import Vocabulary
from kelp.text.tokenizer import Tokenizer
from support.llm_client import Call, http_error, http_get, http_post
from support.serving import HOST, MODEL, KelpServer
from support.waiting import wait_until

NUM_ROUTERS = 3
_STILL_S = 0.05


class Reference:
    """What mock workers say to a prompt."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(MODEL)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer.vocab_size, tuple(sorted(self.tokenizer.eos_token_ids)))

    def encode(self, prompt: str) -> npt.NDArray[np.int32]:
        return np.asarray(self.tokenizer.encode(prompt), np.int32)

    def answer(self, prompt: str, num_tokens: int) -> list[int]:
        return self._vocabulary.continuation(self.encode(prompt).tolist(), num_tokens)


def generate(server: KelpServer, **body: Any) -> dict[str, Any]:
    """One request over HTTP; `ServedError` if it fails."""
    status, answer = http_post(f"{server.http_url}/v2/models/llm/generate", {"max_tokens": 8, **body})
    if status != 200:
        raise http_error(answer)
    return dict(json.loads(answer))


def explain(server: KelpServer, request_id: str) -> dict[str, Any]:
    """The decision about a request, asked of whichever router gets the question."""
    return dict(json.loads(generate(server, text_input="", kelp_explain=request_id)["text_output"]))


def model_of(worker_id: str) -> str:
    return worker_id.rpartition("/")[2]


def worker_of(answer: dict[str, Any]) -> str:
    """Triton's JSON writes a tensor of one element without brackets."""
    assert isinstance(answer["worker_ids"], str)
    return model_of(answer["worker_ids"])


@dataclass(frozen=True)
class Sample:
    """One line of the metrics page."""

    labels: dict[str, str]
    value: float


def samples(server: KelpServer) -> dict[str, list[Sample]]:
    """Triton's metrics by family."""
    _, page = http_get(f"http://{HOST}:{server.metrics_port}/metrics")
    found: defaultdict[str, list[Sample]] = defaultdict(list)
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", page.decode(), re.MULTILINE):
        found[name].append(Sample(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def total(found: Sequence[Sample], **labels: str) -> float:
    """Sum over the samples that have these labels."""
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


def kill_between_responses(server: KelpServer, model: str, workers: Sequence[str], calls: Sequence[Call]) -> None:
    """Kill a model's process while it sends nothing, its workers standing still for less than a second.

    One that dies in the middle of a response holds a lock in Triton's shared memory, and Triton (2.51) aborts.
    """
    dead, paused = server.stub(model), [server.stub(name) for name in workers]
    seen = (-1, time.monotonic())

    def is_still() -> bool:
        nonlocal seen
        num_responses = sum(call.num_waiting for call in calls)
        if num_responses != seen[0]:
            seen = (num_responses, time.monotonic())
        return time.monotonic() - seen[1] >= _STILL_S

    for process in paused:
        process.suspend()
    try:
        wait_until(is_still, "the end of the responses under way")
        dead.kill()
    finally:
        for process in paused:
            process.resume()
