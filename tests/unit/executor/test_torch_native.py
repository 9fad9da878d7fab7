"""The compiled operations are torch's; where they cannot be compiled, nothing else changes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from kelp.executor.torch.native import library
from kelp.executor.torch.native.kernels import Kernels, PoolShape, PreparedRows, RowTables, kernels_for
from kelp.executor.torch.native.library import open_library
from kelp.executor.torch.rotary import rotate

needs_compiler = pytest.mark.skipif(open_library() is None, reason="no C compiler, or not an x86-64 machine")


@pytest.fixture(params=[1, 2])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    found = kernels_for(torch.zeros(1, dtype=torch.bfloat16))
    assert found is not None
    yield found
    torch.set_num_threads(before)


@pytest.fixture
def no_library() -> Iterator[None]:
    open_library.cache_clear()
    yield
    open_library.cache_clear()


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def unequal_share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How many numbers differ; asserts that none does by more than one rounding."""
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    return float((found != expected).float().mean())


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 576), (7, 64), (90, 1536), (3, 5, 128)])
def test_the_norm_is_torchs(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x, weight = 3 * bf16(*shape, seed=1), bf16(shape[-1], seed=2)
    expected = rms_norm(x, weight.shape, None, 1e-5) * weight
    assert unequal_share(kernels.rms_norm(x, weight, 1e-5), expected) < 0.01


@needs_compiler
@pytest.mark.parametrize(("num_rows", "num_heads", "head_dim"), [(1, 15, 64), (40, 15, 64), (3, 4, 18)])
def test_the_rotation_is_torchs_and_leaves_other_heads_alone(
    kernels: Kernels, num_rows: int, num_heads: int, head_dim: int
) -> None:
    heads = bf16(num_rows, num_heads, head_dim, seed=1)
    cos, sin = (bf16(num_rows, 1, head_dim, seed=seed) for seed in (2, 3))
    expected = rotate(heads[:, : num_heads - 2], cos, sin)
    rotated = heads.clone()
    kernels.rotate(rotated, num_heads - 2, cos, sin)
    assert torch.equal(rotated[:, : num_heads - 2], expected)
    assert torch.equal(rotated[:, num_heads - 2 :], heads[:, num_heads - 2 :])


@needs_compiler
@pytest.mark.parametrize("num_rows", [1, 60])
def test_the_gate_is_torchs_for_numbers_of_any_size(kernels: Kernels, num_rows: int) -> None:
    gate_up = 20 * bf16(num_rows, 2 * 700, seed=1)
    gate_up[0, :4] = torch.tensor([1e30, -1e30, 0.0, -100.0])
    gate, up = gate_up.chunk(2, dim=-1)
    assert unequal_share(kernels.silu_multiply(gate_up), silu(gate) * up) < 0.01


@needs_compiler
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("num_kv_heads", "share", "head_dim"), [(3, 3, 64), (1, 4, 128), (2, 2, 80), (2, 16, 256)])
def test_attention_is_exact_for_any_shape(
    kernels: Kernels, num_kv_heads: int, share: int, head_dim: int, window: int | None
) -> None:
    num_heads, block_size, num_layers = num_kv_heads * share, 4, 2
    pool = bf16(40, num_layers, 2, num_kv_heads, block_size, head_dim, seed=1)
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(2)).view(2, 20)
    rows = RowTables(tables, torch.tensor([0, 1, 1]), torch.tensor([77, 1, 66]))
    qkv = 2 * bf16(3, num_heads + 5, head_dim, seed=3)
    query = qkv[:, :num_heads]
    shape = PoolShape(pool, num_heads, head_dim**-0.5)
    found = kernels.attend(shape, PreparedRows(rows, shape), 1, window, query).view(query.shape)
    for row, (table, end) in enumerate(zip(tables[[0, 1, 1]], rows.ends.tolist(), strict=True)):
        begin = 0 if window is None else max(0, end - window)
        kv = pool[table, 1].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, begin:end].double()
        key, value = (part.repeat_interleave(share, 0) for part in kv)
        weights = (torch.einsum("hd,hnd->hn", query[row].double(), key) * head_dim**-0.5).softmax(-1)
        expected = torch.einsum("hn,hnd->hd", weights, value)
        assert float((found[row].double() - expected).norm() / expected.norm()) < 0.004


@needs_compiler
@pytest.mark.parametrize("window", [None, 7])
def test_the_causal_softmax_sees_what_it_should(kernels: Kernels, window: int | None) -> None:
    num_rows, num_positions = 5, 40
    scores = 30 * torch.randn(6, num_rows, num_positions, generator=torch.Generator().manual_seed(1))
    row = torch.arange(num_positions - num_rows, num_positions)[:, None]
    position = torch.arange(num_positions)[None, :]
    hidden = (position > row) | (position <= row - (window or num_positions))
    expected = (scores.double() * 0.3).masked_fill(hidden, -torch.inf).softmax(-1)
    found = kernels.causal_softmax(scores.clone(), num_rows, window, 0.3)
    assert torch.equal(found == 0, expected.bfloat16() == 0)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-30)


@needs_compiler
@pytest.mark.parametrize("vocab_size", [50, 64, 49152])
def test_the_greedy_choice_is_the_first_of_the_highest(kernels: Kernels, vocab_size: int) -> None:
    logits = 8 * bf16(5, vocab_size, seed=1)
    logits[1, [7, 31, 49]] = 90.0
    logits[2, vocab_size - 1] = 90.0
    logits[3] = -200.0
    ids, log_probs = kernels.greedy(logits)
    exact = logits.double().log_softmax(-1)
    assert ids.tolist() == [int(row.argmax()) for row in exact.float().numpy()]
    assert ids.tolist()[1:4] == [7, vocab_size - 1, 0]
    torch.testing.assert_close(log_probs.double(), exact.gather(1, ids[:, None])[:, 0], rtol=1e-4, atol=1e-4)


@needs_compiler
def test_other_types_and_gaps_between_rows_are_left_to_torch() -> None:
    assert kernels_for(torch.zeros(2, 2)) is None
    assert kernels_for(torch.zeros(2, 4, dtype=torch.bfloat16)[:, :2]) is None


@needs_compiler
def test_a_library_is_compiled_once(no_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "default_cache_folder", lambda: tmp_path)
    assert open_library() is not None
    (made,) = (tmp_path / "native").iterdir()
    before = made.stat().st_mtime_ns
    open_library.cache_clear()
    assert open_library() is not None
    assert [path.stat().st_mtime_ns for path in (tmp_path / "native").iterdir()] == [before]


def test_without_a_compiler_there_is_no_library_and_the_log_says_so(
    no_library: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert open_library() is None
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_costs_the_library_only(
    no_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.c:1: error: no such luck' >&2\nexit 1\n")
    os.chmod(compiler, 0o755)
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library.shutil, "which", lambda name: str(compiler))
    monkeypatch.setattr(library, "default_cache_folder", lambda: tmp_path)
    with caplog.at_level(logging.WARNING):
        assert open_library() is None
    assert "no such luck" in caplog.text
    assert not any((tmp_path / "native").iterdir())
