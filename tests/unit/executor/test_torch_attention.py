"""Attention by gather and by the compiled kernel against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kelp.core.messages import SamplingParams
from kelp.executor.batching.batch import Chunk, SamplePoint
from kelp.executor.torch.attention import dense, products
from kelp.executor.torch.attention.base import Attention, AttentionShape
from kelp.executor.torch.attention.dense import attend_span
from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.attention.native import NativeAttention, why_not_native

NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 96, 3, 2, 4, 16
NUM_HEADS = 6
WINDOWS = (None, 5, 11)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None):
    """fp64; `query` `[num_rows, num_heads, head_dim]`: the last rows of `key` `[num_kv_heads, num_positions, ...]`."""
    num_rows, num_heads, _ = query.shape
    share = num_heads // len(key)
    key, value = (part.double().repeat_interleave(share, 0) for part in (key, value))
    scores = torch.einsum("thd,hnd->htn", query.double(), key) * scale
    row = torch.arange(key.shape[1] - num_rows, key.shape[1])[:, None]
    position = torch.arange(key.shape[1])[None, :]
    hidden = position > row
    if window is not None:
        hidden |= position <= row - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("htn,hnd->thd", weights, value)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("window", [None, 7, 150, 1000])
@pytest.mark.parametrize(("num_rows", "num_positions"), [(17, 17), (130, 300), (300, 300)])
def test_a_span_sees_what_precedes_it_within_its_window(num_rows: int, num_positions: int, window: int | None) -> None:
    query = random(num_rows, NUM_HEADS, HEAD_DIM, seed=1)
    key, value = (random(NUM_KV_HEADS, num_positions, HEAD_DIM, seed=seed) for seed in (2, 3))
    found = attend_span(query, key, value, 0.3, window)
    assert relative_error(found, reference(query, key, value, 0.3, window)) < 1e-5


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("scale", [0.125, 0.1])
def test_bf16_scores_of_a_span_are_as_exact_as_fp32_ones(
    scale: float, is_native: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(dense, "kernels", lambda: None)
    query = (20 * random(200, NUM_HEADS, 64, seed=1)).bfloat16()
    key, value = (random(NUM_KV_HEADS, 300, 64, seed=seed).bfloat16() for seed in (2, 3))
    expected = reference(query, key, value, scale, window)
    assert relative_error(attend_span(query, key, value, scale, window), expected) < 0.004


@pytest.mark.skipif(products._MATMUL is None, reason="this torch has no such switch")
def test_leaving_the_products_restores_the_precision_of_others_once_all_have_left() -> None:
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    with products._ONE_DNN:
        with products._ONE_DNN:
            assert switch.fp32_precision == "bf16"
        assert switch.fp32_precision == "bf16", "another thread is still inside"
    assert switch.fp32_precision == before


def test_masks_of_a_long_windowed_prompt_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = random(128, NUM_HEADS, HEAD_DIM).bfloat16(), random(NUM_KV_HEADS, 4000, HEAD_DIM).bfloat16()
    monkeypatch.setattr(dense, "kernels", lambda: None)
    dense._edge_mask.cache_clear()
    for end in range(512, 4000, 128):
        attend_span(query, key[:, :end], key[:, :end], 0.25, 300)
    assert dense._edge_mask.cache_info().misses == 1


class Pool:
    """A pool with known KV, from which each sequence's expected output follows."""

    def __init__(self, dtype: torch.dtype) -> None:
        shape = (NUM_BLOCKS, NUM_LAYERS, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        self.tensor = random(*shape, dtype=dtype, seed=9)
        self.generator = np.random.default_rng(5)
        self.free = list(self.generator.permutation(NUM_BLOCKS - 1) + 1)

    def chunk(self, start: int, num_tokens: int) -> Chunk:
        tokens = np.zeros(num_tokens, np.int32)
        num_blocks = -(-(start + num_tokens) // BLOCK_SIZE)
        block_ids = [int(self.free.pop()) for _ in range(num_blocks)]
        point = SamplePoint(SamplingParams(), tokens, 0, frozenset())
        return Chunk(tokens, start, block_ids, (point,))

    def kv(self, layer: int, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[num_kv_heads, num_positions, head_dim]` of all that the chunk's sequence knows."""
        num_positions = chunk.start + len(chunk.tokens)
        blocks = self.tensor[list(chunk.block_ids), layer]
        key, value = (blocks[:, half].transpose(0, 1).flatten(1, 2)[:, :num_positions] for half in (0, 1))
        return key, value


def make_attention(name: str, pool: torch.Tensor, shape: AttentionShape) -> Attention:
    if name == "gather":
        return GatherAttention(pool, shape)
    reason = why_not_native(pool, shape)
    if reason is not None:
        pytest.skip(reason)
    return NativeAttention(pool, shape)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("gather", torch.float32), ("gather", torch.bfloat16), ("native", torch.bfloat16)]
)
@pytest.mark.parametrize(
    "chunks",
    [
        [(9, 1)],
        [(0, 1), (30, 1), (7, 1)],
        [(3, 1)] * 24,
        [(40, 1), (5, 1), (9, 3), (12, 3), (0, 20), (18, 25)],
        [(11, 5), (70, 5)],
    ],
)
def test_a_mixed_batch_attends_as_each_of_its_chunks_alone(
    chunks: list[tuple[int, int]], backend: str, dtype: torch.dtype
) -> None:
    pool = Pool(dtype)
    batch = [pool.chunk(start, num_tokens) for start, num_tokens in chunks]
    attention = make_attention(backend, pool.tensor, AttentionShape(NUM_HEADS, 0.25, WINDOWS))
    num_rows = sum(num_tokens for _, num_tokens in chunks)
    plan = attention.plan(batch)
    for layer, window in enumerate(WINDOWS):
        query = random(num_rows, NUM_HEADS, HEAD_DIM, dtype=dtype, seed=layer)
        key, value = (random(num_rows, NUM_KV_HEADS, HEAD_DIM, dtype=dtype, seed=seed) for seed in (20, 21))
        found = attention.attend(layer, query, key, value, plan).view(query.shape)
        row = 0
        for chunk in batch:
            rows = slice(row, row + len(chunk.tokens))
            known_key, known_value = pool.kv(layer, chunk)
            assert torch.equal(known_key[:, chunk.start :], key[rows].transpose(0, 1)), "new KV was not stored"
            expected = reference(query[rows], known_key, known_value, 0.25, window)
            assert relative_error(found[rows], expected) < (1e-5 if dtype == torch.float32 else 0.01)
            row = rows.stop


@pytest.mark.parametrize(
    ("backend", "dtype"), [("gather", torch.float32), ("gather", torch.bfloat16), ("native", torch.bfloat16)]
)
def test_nan_in_the_kv_of_others_reaches_no_sequence(backend: str, dtype: torch.dtype) -> None:
    pool = Pool(dtype)
    batch = [pool.chunk(start, 1) for start in (40, 6, 3)]
    own = {int(block_id) for chunk in batch for block_id in chunk.block_ids}
    for block_id in set(range(NUM_BLOCKS)) - own:
        pool.tensor[block_id] = torch.nan
    for chunk in batch:
        pool.tensor[chunk.block_ids[-1], ..., chunk.start % BLOCK_SIZE + 1 :, :] = torch.nan
    attention = make_attention(backend, pool.tensor, AttentionShape(NUM_HEADS, 0.25, (None,) * NUM_LAYERS))
    query, key = random(3, NUM_HEADS, HEAD_DIM, dtype=dtype), random(3, NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
    assert torch.isfinite(attention.attend(0, query, key, key, attention.plan(batch))).all()


def test_other_blocks_of_the_pool_stay_as_they_are() -> None:
    pool = Pool(torch.float32)
    before = pool.tensor.clone()
    chunk = pool.chunk(5, 2)
    attention = GatherAttention(pool.tensor, AttentionShape(NUM_HEADS, 1.0, (None,) * NUM_LAYERS))
    query, key = random(2, NUM_HEADS, HEAD_DIM), random(2, NUM_KV_HEADS, HEAD_DIM)
    attention.attend(1, query, key, key, attention.plan([chunk]))
    changed = (pool.tensor != before).nonzero()
    assert set(changed[:, 0].tolist()) == {chunk.block_ids[1]}
    assert set(changed[:, 1].tolist()) == {1}
    assert set(changed[:, 4].tolist()) == {1, 2}
