"""Padding, scratch block and hand-over of sampled tokens, with a capture that computes again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from row_attention import PlainRowAttention, RememberedCaptures
from tiny_llama import Rig, random_prompt, reference_tokens, save_model

from kelp.core.messages import SamplingParams
from kelp.core.types import BlockId, KVLayout
from kelp.executor.batching.batch import Chunk, SamplePoint
from kelp.executor.torch import decoder as decoder_module
from kelp.executor.torch.attention.base import AttentionShape
from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.cuda.graphs import DecodeGraphs, GraphLimits
from kelp.executor.torch.cuda.runner import CudaRunner
from kelp.executor.torch.decoder import Decoder
from kelp.executor.torch.load import load_parts
from kelp.executor.torch.memory import allocate_pool
from kelp.executor.torch.options import TorchExecutorOptions
from kelp.executor.torch.runner import TorchRunner

NUM_BLOCKS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder)
    return folder


@pytest.fixture
def decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Of the tiny model, on a pool with a scratch block."""
    made = []
    monkeypatch.setattr(decoder_module, "choose_attention", row_attention)
    monkeypatch.setattr("kelp.executor.torch.load.make_runner", lambda decoder, *_: made.append(decoder))
    load_parts(folder, TorchExecutorOptions(dtype="float32", block_size=4, num_blocks=NUM_BLOCKS, threads=1))
    return made[0]


def row_attention(pool: torch.Tensor, shape: AttentionShape, _: str) -> PlainRowAttention:
    return PlainRowAttention(torch.cat((pool, torch.zeros_like(pool[:1]))), shape)


def graphs_of(decoder: Decoder, captures) -> DecodeGraphs:
    return DecodeGraphs(decoder, decoder.attention, GraphLimits(20, 256, 4, BlockId(NUM_BLOCKS)), captures)


def prefilled(runner, num_sequences: int) -> list[Chunk]:
    """Decoding chunks of as many sequences, their prompts computed and their next tokens sampled greedily."""
    prompts = [random_prompt(seed, 3 + 5 * seed) for seed in range(num_sequences)]
    blocks = np.arange(num_sequences * 12).reshape(num_sequences, 12) % NUM_BLOCKS
    chunks = [
        Chunk(np.asarray(prompt, np.int32), 0, line.tolist(), (point(len(prompt)),))
        for prompt, line in zip(prompts, blocks, strict=True)
    ]
    runner.launch(chunks)
    return [
        Chunk(np.zeros(1, np.int32), len(prompt), line.tolist(), (point(len(prompt) + 1),), token_source=index)
        for index, (prompt, line) in enumerate(zip(prompts, blocks, strict=True))
    ]


def point(num_tokens: int) -> SamplePoint:
    return SamplePoint(SamplingParams(), np.zeros(num_tokens, np.int32), 1, frozenset())


def advanced(chunks: list[Chunk]) -> list[Chunk]:
    return [
        Chunk(chunk.tokens, chunk.start + 1, chunk.block_ids, chunk.samples, token_source=index)
        for index, chunk in enumerate(chunks)
    ]


@pytest.mark.parametrize("num_sequences", [1, 3, 5])
def test_steps_through_graphs_sample_what_steps_without_them_do(decoder: Decoder, num_sequences: int):
    captures = RememberedCaptures()
    answers = []
    for graphs in (graphs_of(decoder, captures), None):
        runner = CudaRunner(decoder, graphs)
        chunks = prefilled(runner, num_sequences)
        answer = []
        for _ in range(6):
            answer.append([sampled.token_id for sampled in runner.launch(chunks).result()])
            chunks = advanced(chunks)
        answers.append(answer)
    assert answers[0] == answers[1]
    assert captures.num_captured == 1
    assert captures.num_replays == 1 + 6


def test_padding_writes_into_the_scratch_block_only(decoder: Decoder):
    runner = CudaRunner(decoder, graphs_of(decoder, RememberedCaptures()))
    chunks = prefilled(runner, 3)
    pool = decoder.attention.pool
    before = pool.clone()
    runner.launch(chunks)
    changed = (pool != before).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    written = {chunk.block_ids[chunk.start // 4] for chunk in chunks}
    assert set(changed) == {*written, NUM_BLOCKS}


def test_tokens_stay_with_their_sequences_when_the_batch_shrinks(decoder: Decoder):
    answers = []
    for captures in (RememberedCaptures(), None):
        runner = CudaRunner(decoder, graphs_of(decoder, captures) if captures else None)
        chunks = prefilled(runner, 4)
        runner.launch(chunks)
        rest = advanced(chunks)[1::2]
        answers.append([sampled.token_id for sampled in runner.launch(rest).result()])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(np.zeros(2, np.int32), 4, [1, 2], (point(6),)),
        Chunk(np.zeros(1, np.int32), 4, [1, 2]),
        Chunk(np.zeros(1, np.int32), 4, [1, 2], (point(5),), lora_name="tone"),
    ],
)
def test_steps_that_are_no_plain_decoding_do_not_fit(decoder: Decoder, chunk: Chunk):
    graphs = graphs_of(decoder, RememberedCaptures())
    plain = Chunk(np.zeros(1, np.int32), 4, [1, 2], (point(5),))
    assert graphs.fits([plain])
    assert not graphs.fits([plain, chunk])
    assert not graphs.fits([plain] * 21)


def test_a_capture_that_fails_ends_graphs_and_not_the_step(decoder: Decoder, caplog: pytest.LogCaptureFixture):
    def refuse(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = graphs_of(decoder, refuse)
    runner = CudaRunner(decoder, graphs)
    chunks = prefilled(runner, 2)
    assert len(runner.launch(chunks).result()) == 2
    assert "not permitted when stream is capturing" in caplog.text
    assert not graphs.fits(chunks)


def test_a_graph_that_answers_otherwise_is_not_used(decoder: Decoder, caplog: pytest.LogCaptureFixture):
    graphs = graphs_of(decoder, lambda compute: lambda: compute() * 1.2)
    runner = CudaRunner(decoder, graphs)
    runner.launch(prefilled(runner, 2))
    assert "differs" in caplog.text
    assert not graphs.fits([])


def test_the_cuda_runner_answers_as_transformers_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    captures = RememberedCaptures()
    monkeypatch.setattr(decoder_module, "choose_attention", row_attention)
    monkeypatch.setattr(
        "kelp.executor.torch.load.make_runner", lambda decoder, *_: CudaRunner(decoder, graphs_of(decoder, captures))
    )
    model = save_model(tmp_path)
    rig = Rig(tmp_path, max_step_tokens=16, max_running=4)
    prompts = [random_prompt(seed, 5 + 9 * seed) for seed in range(4)]
    answers = [rig.submit(prompt, 8) for prompt in prompts]
    rig.run()
    assert [answer.tokens for answer in answers] == [reference_tokens(model, prompt, 8) for prompt in prompts]
    assert captures.num_replays > captures.num_captured > 1


def test_on_the_cpu_the_plain_runner_and_the_plain_backend_serve(folder: Path):
    parts = load_parts(folder, TorchExecutorOptions(dtype="float32", num_blocks=8, threads=1))
    assert isinstance(parts.runner, TorchRunner)
    assert isinstance(parts.runner._decoder.attention, GatherAttention)


def test_scratch_blocks_lie_behind_what_peers_are_told_of():
    layout = KVLayout(8, num_layers=2, num_kv_heads=2, block_size=4, head_dim=8, dtype="float32", model_id="m")
    pool, memory = allocate_pool(layout, torch.device("cpu"), num_scratch_blocks=2)
    assert len(pool) == 10
    assert memory.num_bytes == layout.pool_bytes
    assert isinstance(memory.owner, torch.Tensor)
    assert memory.owner.data_ptr() == memory.base_address == pool.data_ptr()
    assert len(memory.owner) == 8
