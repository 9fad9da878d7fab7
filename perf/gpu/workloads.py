"""What is measured on a GPU, against what, and how figures become rows."""

from __future__ import annotations

import random
from collections.abc import Iterator

from perf.executor.contest import CaseResult
from perf.executor.protocol import Job
from perf.executor.workloads import Case
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Pair, median, paired_ratio

KELP, TRANSFORMERS, BANDWIDTH = "kelp", "transformers", "bandwidth"
UNIT = "tokens/s"
CASES = (
    Case("prefill_512", num_sequences=1, prompt_tokens=512, max_tokens=1, repeats=3),
    Case("prefill_2048", num_sequences=1, prompt_tokens=2048, max_tokens=1, repeats=3),
    Case("prefill_8192", num_sequences=1, prompt_tokens=8191, max_tokens=1),
    Case("decode_b1", num_sequences=1, prompt_tokens=128, max_tokens=128),
    Case("decode_b8", num_sequences=8, prompt_tokens=128, max_tokens=128),
    Case("decode_b32", num_sequences=32, prompt_tokens=128, max_tokens=96),
    Case("decode_b128", num_sequences=128, prompt_tokens=128, max_tokens=64),
)
"""The longest prompt leaves room for the one token of a model that takes 8192."""

MAX_MODEL_TOKENS = 8192
MAX_RUNNING = 128
_LOWEST_PLAIN_TOKEN = 1000


def references_of(case: Case) -> tuple[str, ...]:
    """Whom kelp is compared with; bandwidth bounds decoding only."""
    return (TRANSFORMERS,) if case.is_prefill else (TRANSFORMERS, BANDWIDTH)


def required_rows() -> Iterator[RequiredRow]:
    """Everything that a run must print."""
    for case in CASES:
        for reference in references_of(case):
            yield RequiredRow(case.name, f"tokens_per_s/{reference}", UNIT, needs_reference=True)


def make_job(case: Case, vocab_size: int, seed: int) -> Job:
    """Random prompts; another seed gives others, which share no first block with these."""
    generator = random.Random(f"{case.name} {seed}")
    ids = range(min(_LOWEST_PLAIN_TOKEN, vocab_size // 2), vocab_size)
    prompts = (tuple(generator.choices(ids, k=case.prompt_tokens)) for _ in range(case.num_sequences))
    return Job(tuple(prompts), case.max_tokens)


def rows_of(result: CaseResult) -> Iterator[Measurement]:
    """The rows of one case: medians over the rounds, and the ratio of the rounds."""
    figures = result.figures.get(KELP, [])
    for reference in references_of(result.case):
        theirs = result.figures.get(reference, [])
        comparison = None
        if figures and theirs:
            pairs = [Pair(value, other) for value, other in zip(figures, theirs, strict=False)]
            comparison = Comparison(reference, median(theirs), paired_ratio(pairs, is_lower_better=False))
        trouble = result.troubles.get(KELP) or result.troubles.get(reference) or ""
        value = median(figures) if figures else None
        metric = f"tokens_per_s/{reference}"
        yield Measurement(result.case.name, metric, UNIT, value, comparison, trouble)
