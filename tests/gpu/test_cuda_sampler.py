"""The device chooses what the host chooses from the same logits, and does not wait in between."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kelp.core.messages import SamplingParams
from kelp.executor.batching.batch import SamplePoint
from kelp.executor.torch.cuda.runner import QueuedStep
from kelp.executor.torch.device_sampler import plan_draws
from kelp.executor.torch.noise import exponential_noise, noise_key
from kelp.executor.torch.sampler import sample, sample_rows

pytestmark = pytest.mark.gpu
VOCAB_SIZE = 50_000


def points() -> list[SamplePoint]:
    kinds = itertools.product((0.0, 0.7, 1.3), (0, 1, 40, 2000), (1.0, 0.9), (0.0, 0.05))
    return [
        SamplePoint(
            SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            np.zeros(3, np.int32),
            1,
            frozenset(),
        )
        for seed, (temperature, top_k, top_p, min_p) in enumerate(kinds)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_chooses_the_tokens_of_the_host(dtype: torch.dtype):
    batch = points()
    logits = (torch.randn(len(batch), VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    on_host, on_device = sample(logits, batch), sample(logits.cuda(), batch)
    assert [each.token_id for each in on_device] == [each.token_id for each in on_host]
    assert [each.log_prob for each in on_device] == pytest.approx([each.log_prob for each in on_host], abs=1e-3)


def test_noise_is_that_of_the_host():
    keys, ids = torch.tensor([[noise_key(7, 3)], [noise_key(2**64 - 1, 0)]]), torch.arange(1000)
    found = exponential_noise(keys.cuda(), ids.cuda()).cpu()
    torch.testing.assert_close(found, exponential_noise(keys, ids), rtol=1e-12, atol=0)


def test_choosing_does_not_wait_for_the_device():
    batch = points()
    logits = torch.randn(len(batch), VOCAB_SIZE, device="cuda")
    expected = sample(logits, batch)
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draws = plan_draws(batch, logits.device)
        step = QueuedStep(*sample_rows(logits, batch, draws))
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    assert step.result() == expected
