"""The torch executor and NIXL on a CUDA device; skipped where there is none."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, save_family

from kelp.core.clock import SystemClock
from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import Role
from kelp.executor.base import Completed, Executor, ExecutorEvent, ExecutorRequest, Failed, Tokens
from kelp.executor.batching.executor import BatchingExecutor
from kelp.executor.torch.load import load_parts, load_torch_executor
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.transport import open_agent
from kelp.transport.base import TransferState
from kelp.transport.layout import pool_region

pytestmark = pytest.mark.gpu
OPTIONS = TorchExecutorOptions(dtype="float32", device="cuda:0", num_blocks=128, max_step_tokens=64, threads=1)
PROMPTS = [np.random.default_rng(seed).integers(0, 160, 20 + 17 * seed).astype(np.int32) for seed in range(6)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_family(folder, "llama with biases")
    return folder


def build(folder: Path, device: str, **changes: object) -> Executor:
    return load_torch_executor(folder, replace(OPTIONS, device=device, **changes))


def answers(executor: Executor, **sampling: object) -> list[list[int]]:
    """All prompts at once, 16 tokens each; closes the executor."""
    sinks: list[queue.SimpleQueue[ExecutorEvent]] = []
    try:
        for index, prompt in enumerate(PROMPTS):
            sinks.append(queue.SimpleQueue())
            executor.submit(
                ExecutorRequest(
                    request_id=str(index),
                    prompt=prompt,
                    role=Role.AGGREGATED,
                    sampling=SamplingParams(max_tokens=16, seed=index, **sampling),
                    seed_hash=seed_hash("tiny"),
                    sink=sinks[-1].put,
                )
            )
        return [tokens_of(sink) for sink in sinks]
    finally:
        executor.close()


def tokens_of(sink: queue.SimpleQueue[ExecutorEvent]) -> list[int]:
    tokens: list[int] = []
    while not isinstance(event := sink.get(timeout=60), Completed):
        assert not isinstance(event, Failed), event.error
        if isinstance(event, Tokens):
            tokens.extend(event.token_ids)
    return tokens


@torch.inference_mode()
def reference(model, prompt: np.ndarray) -> list[int]:
    """What transformers continues with on the CPU, token by token."""
    history = prompt.tolist()
    for _ in range(16):
        history.append(int(model(torch.tensor([history])).logits[0, -1].argmax()))
    return history[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_fp32_tokens_equal_those_of_transformers(family: str, tmp_path: Path):
    model = save_family(tmp_path, family)
    assert answers(build(tmp_path, "cuda:0")) == [reference(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("attention", ["gather", "split-kv"])
def test_every_backend_answers_as_the_cpu_does(attention: str, model_folder: Path):
    assert answers(build(model_folder, "cuda:0", attention=attention)) == answers(build(model_folder, "cpu"))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 0.8, "top_k": 20}])
def test_graphs_change_no_token(sampling: dict[str, object], model_folder: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    with_graphs = answers(build(model_folder, "cuda:0"), **sampling)
    assert "captured a decoding step" in caplog.text, "graphs were not used"
    assert "without CUDA graphs" not in caplog.text
    assert with_graphs == answers(build(model_folder, "cuda:0", enable_cuda_graphs=False), **sampling)


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_in_flight_change_no_token(graphs: bool, model_folder: Path):
    for sampling in ({}, {"temperature": 0.9}, {"temperature": 0.9, "repetition_penalty": 1.2}):
        found = []
        for max_in_flight in (1, 2):
            parts = load_parts(model_folder, replace(OPTIONS, enable_cuda_graphs=graphs))
            assert parts.rules.max_in_flight == 2
            rules = replace(parts.rules, max_in_flight=max_in_flight)
            found.append(answers(BatchingExecutor(replace(parts, rules=rules), SystemClock()), **sampling))
        assert found[0] == found[1], sampling


def test_bf16_follows_fp32_for_the_likeliest_tokens(model_folder: Path):
    exact = answers(build(model_folder, "cuda:0"))
    rounded = answers(build(model_folder, "cuda:0", dtype="bfloat16"))
    agreeing = [ours[0] == theirs[0] for ours, theirs in zip(rounded, exact, strict=True)]
    assert sum(agreeing) >= len(PROMPTS) - 1


def test_nixl_reads_blocks_between_two_pools_in_device_memory(model_folder: Path):
    source, target = build(model_folder, "cuda:0"), build(model_folder, "cuda:0")
    owner, reader = open_agent("nixl", "owner"), open_agent("nixl", "reader")
    try:
        regions = []
        for agent, executor in ((owner, source), (reader, target)):
            memory = executor.pool_memory
            assert memory.device == "cuda:0"
            regions.append(pool_region(executor.layout, memory.base_address, memory.device))
            agent.register(regions[-1], memory.owner)
        pools = [executor.pool_memory.owner for executor in (source, target)]
        assert all(isinstance(pool, torch.Tensor) for pool in pools)
        pools[0].normal_()
        pools[1].zero_()
        torch.cuda.synchronize()
        peer = reader.connect(owner.metadata(), regions[0])
        transfer = reader.start_read(peer, [3, 5, 9], [10, 2, 0])
        while transfer.poll() is not TransferState.DONE:
            pass
        torch.cuda.synchronize()
        assert torch.equal(pools[1][[10, 2, 0]], pools[0][[3, 5, 9]])
        assert not pools[1][1].any()
    finally:
        reader.close()
        owner.close()
        source.close()
        target.close()
