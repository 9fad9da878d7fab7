"""Packed products are the plain ones; without them everything still works."""

from __future__ import annotations

import pytest
import torch

from kelp.executor.torch import linear
from kelp.executor.torch.linear import PackedLinear, PlainLinear, can_pack, make_linear

needs_packing = pytest.mark.skipif(not can_pack(), reason="this processor or torch has no packed bf16 product")


def bf16(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_packing
@pytest.mark.parametrize("num_rows", [1, 7, 32, 200])
@pytest.mark.parametrize(("num_out", "num_in"), [(960, 576), (576, 1536), (130, 70)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_product_is_the_plain_one(num_rows: int, num_out: int, num_in: int, has_bias: bool) -> None:
    weight, x = bf16(num_out, num_in, seed=1), bf16(num_rows, num_in, seed=2)
    bias = bf16(num_out, seed=3) if has_bias else None
    plain, packed = PlainLinear(weight, bias)(x), PackedLinear(weight, bias)(x)
    assert packed.shape == plain.shape
    assert torch.equal(packed, plain)


@needs_packing
def test_bf16_weights_on_a_cpu_are_packed() -> None:
    assert isinstance(make_linear(bf16(8, 8, seed=1)), PackedLinear)


def test_fp32_weights_are_left_alone() -> None:
    assert isinstance(make_linear(torch.ones(8, 8)), PlainLinear)


def test_a_torch_without_the_packed_product_uses_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def __init__(self, *_: object) -> None:
            raise AttributeError("no such operator")

    monkeypatch.setattr(linear, "PackedLinear", Missing)
    can_pack.cache_clear()
    try:
        assert isinstance(make_linear(bf16(8, 8, seed=1)), PlainLinear)
    finally:
        can_pack.cache_clear()
