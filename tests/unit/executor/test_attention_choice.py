from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_attention import Geometry, PlainAttention, chunks_of, run
from row_attention import PlainRowAttention
from tiny_llama import save_model

from kelp.core.errors import ConfigError
from kelp.executor.torch.attention import select, varlen
from kelp.executor.torch.attention.gather import GatherAttention
from kelp.executor.torch.attention.paged import RowAttention
from kelp.executor.torch.attention.select import choose_attention
from kelp.executor.torch.attention.trial import why_trial_fails
from kelp.executor.torch.attention.varlen import VarlenAttention, VarlenPlan, why_not_varlen
from kelp.executor.torch.load import load_parts
from kelp.executor.torch.options import TorchExecutorOptions

GEOMETRY = Geometry()


class OffByALittle(PlainAttention):
    def attend(self, *arguments):
        return super().attend(*arguments) + 0.01


class Raising(PlainAttention):
    def plan(self, chunks):
        raise RuntimeError("no kernel image is available\nsecond line")


class NotANumber(PlainAttention):
    def attend(self, *arguments):
        return super().attend(*arguments) * float("nan")


class WrongRows(PlainRowAttention):
    """Right where the host plans, wrong where the device does."""

    def plan_rows(self, positions, tables):
        return super().plan_rows(torch.zeros_like(positions), tables)


def test_a_backend_that_agrees_passes_its_trial():
    pool = GEOMETRY.pool()
    assert why_trial_fails(PlainAttention, pool, GEOMETRY.shape) is None
    assert torch.equal(pool, GEOMETRY.pool())


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (OffByALittle, "off by 0.01, tolerated are 0.001"),
        (Raising, "RuntimeError: no kernel image is available"),
        (NotANumber, "off by inf"),
        (WrongRows, "off by"),
    ],
)
def test_a_backend_that_answers_wrongly_fails_its_trial(factory, reason: str):
    found = why_trial_fails(factory, GEOMETRY.pool(), GEOMETRY.shape)
    assert found is not None
    assert reason in found
    assert "\n" not in found


def test_on_the_cpu_auto_takes_gather():
    assert isinstance(choose_attention(GEOMETRY.pool(), GEOMETRY.shape, "auto"), GatherAttention)


def test_a_forced_backend_that_cannot_serve_is_refused_with_the_reason(tmp_path: Path):
    save_model(tmp_path)
    for name in ("varlen", "split-kv"):
        options = TorchExecutorOptions(dtype="float32", num_blocks=8, threads=1, attention=name)
        with pytest.raises(ConfigError, match=f"executor.attention: '{name}' cannot serve here: .*CUDA device"):
            load_parts(tmp_path, options)


def test_split_kv_without_the_compiler_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(select.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="the package triton cannot be imported: No module named"):
        choose_attention(GEOMETRY.pool(), GEOMETRY.shape, "split-kv")


class OnCuda:
    """What `why_not_varlen` asks of a pool."""

    is_cuda = True
    device = torch.device("cuda:0")

    def __init__(self, dtype: torch.dtype = torch.bfloat16, block_size: int = 256, head_dim: int = 64) -> None:
        self.dtype = dtype
        self.shape = (8, 2, 2, 2, block_size, head_dim)


@pytest.mark.parametrize(
    ("pool", "capability", "reason"),
    [
        (OnCuda(), (8, 0), None),
        (OnCuda(), (7, 5), "compute capability 8.0"),
        (OnCuda(torch.float32), (9, 0), "no kernel for torch.float32"),
        (OnCuda(head_dim=260), (9, 0), "no kernel for head_dim 260"),
        (OnCuda(head_dim=12), (9, 0), "no kernel for head_dim 12"),
        (OnCuda(block_size=16), (9, 0), "multiples of 256, executor.block_size is 16"),
    ],
)
def test_varlen_says_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch, pool, capability, reason: str | None):
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = why_not_varlen(pool)
    assert found is None if reason is None else reason in str(found)


def test_varlen_takes_small_blocks_where_a_newer_kernel_is_active(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(varlen.torch_attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    assert why_not_varlen(OnCuda(block_size=16)) is None


def test_varlen_needs_a_torch_whose_function_takes_block_tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, scale=None, window_size=(-1, -1): query)
    assert "has no varlen_attn with block_table, enable_gqa, num_splits, seqused_k" in str(why_not_varlen(OnCuda()))
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert "has no varlen_attn with block_table" in str(why_not_varlen(OnCuda()))


def reference_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int | None,
) -> torch.Tensor:
    """What the documentation of `torch.nn.attention.varlen.varlen_attn` says, causal from the lower right."""
    assert key.dim() == value.dim() == 4
    assert key.stride(-1) == value.stride(-1) == query.stride(-1) == 1
    assert all(part.dtype == torch.int32 for part in (cu_seq_q, seqused_k, block_table))
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert num_splits == 1, "FlashAttention 2 must not choose splits itself"
    assert cu_seq_k is not None, "FlashAttention 2 wants cumulative lengths"
    assert cu_seq_k.tolist() == [0, *seqused_k.cumsum(0).tolist()]
    out = torch.empty_like(query)
    bounds = cu_seq_q.tolist()
    assert max_q == max(end - begin for begin, end in zip(bounds, bounds[1:], strict=False))
    for line, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        length = int(seqused_k[line])
        assert length <= max_k
        group = query.shape[1] // key.shape[2]
        k, v = (pages[block_table[line].long()].flatten(0, 1)[:length] for pages in (key, value))
        k, v = (part.repeat_interleave(group, dim=1).double() for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), k) * scale
        distance = torch.arange(length - (end - begin), length)[:, None] - torch.arange(length)[None, :]
        is_seen = distance >= 0
        if window_size[0] >= 0:
            is_seen &= distance <= window_size[0]
        scores = scores.masked_fill(~is_seen, -torch.inf)
        out[begin:end] = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v).to(query.dtype)
    return out


@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("spans", [[(0, 1), (3, 1), (30, 1)], [(17, 1), (0, 3), (9, 2), (0, 21), (6, 13)]])
def test_varlen_gets_what_its_documentation_asks_for(
    monkeypatch: pytest.MonkeyPatch, spans: list[tuple[int, int]], num_heads: int
):
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    geometry = Geometry(num_heads=num_heads, windows=(None, 5))
    ours, plain = geometry.pool(), geometry.pool()
    chunks = chunks_of(spans, geometry)
    found = run(VarlenAttention(ours, geometry.shape), chunks, geometry)
    torch.testing.assert_close(
        found, run(PlainAttention(plain, geometry.shape), chunks, geometry), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(ours, plain)


def test_varlen_plans_alike_on_the_host_and_on_the_device():
    geometry = Geometry()
    chunks = chunks_of([(0, 1), (3, 1), (30, 1)], geometry)
    backend = VarlenAttention(geometry.pool(), geometry.shape)
    assert isinstance(backend, RowAttention)
    from_host = backend.plan(chunks)
    on_device = backend.plan_rows(torch.tensor([0, 3, 30]), from_host.tables)
    for name in VarlenPlan.__slots__:
        ours, theirs = getattr(on_device, name), getattr(from_host, name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name
