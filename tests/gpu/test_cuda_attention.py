"""Every attention backend on a device against the definition, planned on the host and inside a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_attention import Geometry, PlainAttention, chunks_of, run

from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.attention.paged import RowAttention, block_tables
from kelp.executor.torch.attention.select import _factory, choose_attention
from kelp.executor.torch.attention.trial import why_trial_fails
from kelp.executor.torch.cuda.graphs import capture_graph

pytestmark = pytest.mark.gpu
HALF = Geometry(
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    block_size=16,
    windows=(None, 40),
    dtype=torch.bfloat16,
    num_blocks=400,
    device="cuda:0",
)
GEOMETRIES = {
    "bf16": HALF,
    "fp32": replace(HALF, dtype=torch.float32),
    "wide heads": replace(HALF, head_dim=128, num_kv_heads=8),
    "odd heads": replace(HALF, num_heads=14, head_dim=80, block_size=12),
    "large blocks": replace(HALF, block_size=256, num_blocks=40),
}
DECODES = [(0, 1), (15, 1), (16, 1), (700, 1), (1500, 1)]
MIXED = [(700, 1), (33, 1), (0, 3), (90, 4), (0, 200), (300, 130), (7, 90)]


def backend(name: str, geometry: Geometry, pool: torch.Tensor):
    """The backend, or a skip that says why the device or torch has none."""
    if name == "gather":
        return GatherAttention(pool, geometry.shape)
    factory = _factory(name, pool)
    if isinstance(factory, str):
        pytest.skip(factory)
    return factory(pool, geometry.shape)


def tolerance(geometry: Geometry) -> float:
    return 1e-4 if geometry.dtype == torch.float32 else 2e-2


@pytest.mark.parametrize("spans", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", ["gather", "split-kv", "varlen"])
@torch.inference_mode()
def test_a_backend_agrees_with_the_definition(name: str, geometry: Geometry, spans: list[tuple[int, int]]):
    ours, plain = geometry.pool(), replace(geometry, device="cpu").pool()
    chunks = chunks_of(spans, geometry)
    found = run(backend(name, geometry, ours), chunks, geometry)
    expected = run(PlainAttention(plain, geometry.shape), chunks, replace(geometry, device="cpu"))
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance(geometry), atol=tolerance(geometry))
    assert torch.equal(ours.cpu(), plain), "KV went elsewhere"


@pytest.mark.parametrize("geometry", [HALF, GEOMETRIES["large blocks"]], ids=["small blocks", "large blocks"])
@pytest.mark.parametrize("name", ["split-kv", "varlen"])
@torch.inference_mode()
def test_a_captured_step_follows_its_positions_and_tables(name: str, geometry: Geometry):
    subject = backend(name, geometry, geometry.pool())
    assert isinstance(subject, RowAttention)
    steps = [chunks_of([(5, 1), (600, 1), (16, 1)], geometry, seed=3), chunks_of(DECODES[2:], geometry, seed=4)]
    width = max(block_tables(step, geometry.block_size).shape[1] for step in steps)
    positions = torch.zeros(3, dtype=torch.int64, device=geometry.device)
    tables = torch.zeros(3, width, dtype=torch.int32, device=geometry.device)

    qkv = geometry.qkv(3)

    def compute() -> torch.Tensor:
        return subject.attend(1, *qkv, subject.plan_rows(positions, tables))

    compute()
    replay = capture_graph(compute)
    for step in steps:
        positions.copy_(torch.tensor([chunk.start for chunk in step]))
        lines = torch.from_numpy(block_tables(step, geometry.block_size))
        tables.zero_()
        tables[:, : lines.shape[1]] = lines.to(geometry.device)
        expected = subject.attend(1, *qkv, subject.plan(step)).clone()
        torch.testing.assert_close(replay(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_auto_takes_something_better_than_gather(geometry: Geometry):
    chosen = choose_attention(geometry.pool(), geometry.shape, "auto")
    reasons = {}
    for name in ("varlen", "split-kv"):
        factory = _factory(name, geometry.pool())
        is_refused = isinstance(factory, str)
        reasons[name] = factory if is_refused else why_trial_fails(factory, geometry.pool(), geometry.shape)
    assert not isinstance(chosen, GatherAttention), reasons
