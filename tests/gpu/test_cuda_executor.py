"""The torch executor and NIXL on a CUDA device; skipped where there is none."""

from __future__ import annotations

import queue
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kelp.core.hashing import seed_hash
from kelp.core.messages import SamplingParams
from kelp.core.types import Role
from kelp.executor.base import Completed, Executor, ExecutorEvent, ExecutorRequest, Failed, Tokens
from kelp.executor.torch.load import load_torch_executor
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.transport import open_agent
from kelp.transport.base import TransferState
from kelp.transport.layout import pool_region

pytestmark = pytest.mark.gpu
PROMPTS = [np.random.default_rng(seed).integers(0, 160, 20 + 17 * seed).astype(np.int32) for seed in range(6)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build(folder: Path, device: str) -> Executor:
    options = TorchExecutorOptions(dtype="float32", device=device, num_blocks=128, max_step_tokens=64, threads=1)
    return load_torch_executor(folder, options)


def greedy(executor: Executor) -> list[list[int]]:
    """All prompts at once, 16 tokens each."""
    sinks: list[queue.SimpleQueue[ExecutorEvent]] = []
    for index, prompt in enumerate(PROMPTS):
        sinks.append(queue.SimpleQueue())
        executor.submit(
            ExecutorRequest(
                request_id=str(index),
                prompt=prompt,
                role=Role.AGGREGATED,
                sampling=SamplingParams(max_tokens=16),
                seed_hash=seed_hash("tiny"),
                sink=sinks[-1].put,
            )
        )
    return [tokens_of(sink) for sink in sinks]


def tokens_of(sink: queue.SimpleQueue[ExecutorEvent]) -> list[int]:
    tokens: list[int] = []
    while not isinstance(event := sink.get(timeout=60), Completed):
        assert not isinstance(event, Failed), event.error
        if isinstance(event, Tokens):
            tokens.extend(event.token_ids)
    return tokens


def test_greedy_fp32_tokens_on_cuda_equal_those_on_the_cpu(model_folder: Path):
    on_cpu, on_cuda = build(model_folder, "cpu"), build(model_folder, "cuda:0")
    try:
        assert greedy(on_cuda) == greedy(on_cpu)
    finally:
        on_cpu.close()
        on_cuda.close()


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
