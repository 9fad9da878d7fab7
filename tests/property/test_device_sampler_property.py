"""The batched choice against the definition, written row by row in numpy."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kelp.core.messages import SamplingParams
from kelp.executor.batching.batch import SamplePoint
from kelp.executor.torch.sampler import sample
from support.examples import examples

VOCAB_SIZE = 40


def reference(logits: np.ndarray, params: SamplingParams, index: int) -> int:
    """One row, `[vocab_size] fp32`, sorted outright."""
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(
        torch.from_numpy((logits - logits.max()) / np.float32(params.temperature)), -1
    ).numpy()
    by_size = sorted(range(len(logits)), key=lambda token: (-probabilities[token], token))
    kept = [token for token in by_size if probabilities[token] > 0]
    kept = [token for token in kept if probabilities[token] >= np.float32(params.min_p) * probabilities.max()]
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    masses = np.cumsum([float(probabilities[token]) for token in kept])
    if params.top_p < 1:
        kept = [
            token
            for token, mass in zip(kept, masses, strict=True)
            if mass - float(probabilities[token]) < params.top_p * masses[-1]
        ]
    return min(kept, key=lambda token: (-float(probabilities[token]) / noise(params.seed, index, token), token))


def noise(seed: int, index: int, token: int) -> float:
    raw = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    state = int.from_bytes(hashlib.blake2b(raw, digest_size=8, person=b"kelp-sample").digest(), "little")
    state = (state + (token + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    state ^= state >> 31
    return float(-np.log(((state >> 11) + 0.5) * 2.0**-53))


sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 100]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.5, 0.93]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.6]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=examples(80), deadline=None)
@given(
    rows=st.lists(st.tuples(sampling, st.integers(0, 9)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    num_levels=st.sampled_from([3, 12, 10_000]),
)
def test_every_row_of_a_batch_gets_the_token_of_the_definition(
    rows: list[tuple[SamplingParams, int]], seed: int, num_levels: int
):
    # Few levels make many equal probabilities, whose order the definition fixes.
    logits = np.random.default_rng(seed).integers(0, num_levels, (len(rows), VOCAB_SIZE)).astype(np.float32)
    logits *= np.float32(8 / num_levels)
    points = [
        SamplePoint(params, np.zeros(1 + index, np.int32), num_prompt_tokens=1, stop_token_ids=frozenset())
        for params, index in rows
    ]
    found = [sampled.token_id for sampled in sample(torch.from_numpy(logits), points)]
    assert found == [reference(row, params, index) for row, (params, index) in zip(logits, rows, strict=True)]
