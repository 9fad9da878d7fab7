"""What `test_split_kv` runs in a process of its own, because the kernels are interpreted for a whole process or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_attention import Geometry, PlainAttention, chunks_of, run
from tiny_llama import Rig, random_prompt, reference_tokens, save_model

from kelp.executor.torch.attention import split_kv, split_kv_kernel
from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.attention.split_kv import SplitKVAttention

torch.set_num_threads(1)

DECODES = [(0, 1), (3, 1), (4, 1), (30, 1)]
MIXED = [(17, 1), (0, 3), (9, 2), (0, 21), (6, 13)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def assert_agrees(geometry: Geometry, spans: list[tuple[int, int]]) -> None:
    ours, plain = geometry.pool(), geometry.pool()
    chunks = chunks_of(spans, geometry)
    found = run(SplitKVAttention(ours, geometry.shape), chunks, geometry)
    expected = run(PlainAttention(plain, geometry.shape), chunks, geometry)
    tolerance = TOLERANCE[geometry.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours, plain), "KV went elsewhere"


def test_the_kernels_are_interpreted_here():
    assert not split_kv_kernel.IS_COMPILED


@pytest.mark.parametrize("spans", [DECODES, MIXED])
@pytest.mark.parametrize("num_heads", [2, 6, 14])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 96, 128])
def test_decodes_and_chunks_agree_with_the_definition(head_dim: int, num_heads: int, spans: list[tuple[int, int]]):
    assert_agrees(Geometry(num_heads=num_heads, head_dim=head_dim), spans)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size_is_read_across_its_borders(block_size: int):
    assert_agrees(Geometry(block_size=block_size, num_blocks=100), MIXED)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 100])
def test_a_window_hides_older_positions_in_its_layer_only(window: int):
    assert_agrees(Geometry(windows=(None, window)), MIXED)


def test_half_precision_keeps_its_sums_in_full_precision():
    assert_agrees(Geometry(dtype=torch.float16, head_dim=64), [*DECODES, (0, 40)])


@pytest.mark.parametrize("num_splits", [1, 2, 4, 8])
@pytest.mark.parametrize("window", [None, 70])
def test_splits_that_see_nothing_change_nothing(num_splits: int, window: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SplitKVAttention, "_num_splits", lambda *_: num_splits)
    geometry = Geometry(block_size=16, num_blocks=64, windows=(window,))
    assert_agrees(geometry, [(0, 1), (63, 1), (64, 1), (300, 1), (130, 3), (0, 9)])


def test_steps_agree_with_the_gather_backend():
    geometry = Geometry(block_size=8, head_dim=64, num_heads=4)
    chunks = chunks_of(MIXED, geometry)
    found = run(SplitKVAttention(geometry.pool(), geometry.shape), chunks, geometry)
    expected = run(GatherAttention(geometry.pool(), geometry.shape), chunks, geometry)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_plan_made_on_the_device_equals_one_made_on_the_host():
    geometry = Geometry()
    chunks = chunks_of(DECODES, geometry)
    backend = SplitKVAttention(geometry.pool(), geometry.shape)
    from_host = backend.plan(chunks)
    on_device = backend.plan_rows(torch.tensor([chunk.start for chunk in chunks]), from_host.tables)
    assert torch.equal(on_device.places, from_host.places)
    assert torch.equal(on_device.singles, from_host.singles)
    assert on_device.num_splits == from_host.num_splits
    assert not len(on_device.spans)


def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path):
    model = save_model(tmp_path)
    rig = Rig(tmp_path, attention="split-kv", max_step_tokens=24, max_running=4)
    prompts = [random_prompt(seed, 5 + 9 * seed) for seed in range(4)]
    answers = [rig.submit(prompt, 6) for prompt in prompts]
    rig.run()
    assert [answer.tokens for answer in answers] == [reference_tokens(model, prompt, 6) for prompt in prompts]


def test_the_number_of_splits_follows_the_work_and_stays_a_power_of_two():
    backend = SplitKVAttention(Geometry(block_size=16).pool(), Geometry().shape)
    found = {(tiles, blocks): backend._num_splits(tiles, blocks) for tiles in (0, 1, 2, 8, 64) for blocks in (1, 64)}
    assert all(value & (value - 1) == 0 for value in found.values())
    assert found[1, 64] == 8
    assert found[1, 1] == found[64, 64] == 1
    assert found[2, 64] == 4


def test_tiles_of_several_tokens_may_hold_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(split_kv, "_MAX_SINGLES", 0)
    assert_agrees(Geometry(), MIXED)


def test_random_steps_agree_with_the_definition():
    random = np.random.default_rng(5)
    for _ in range(12):
        geometry = Geometry(
            num_heads=2 * int(random.integers(1, 6)),
            head_dim=int(random.choice([16, 32, 64])),
            block_size=int(random.integers(1, 20)),
            windows=(None, int(random.integers(1, 40))),
            num_blocks=400,
        )
        spans = [(int(random.integers(0, 60)), int(random.integers(1, 30))) for _ in range(int(random.integers(1, 5)))]
        assert_agrees(geometry, spans)
