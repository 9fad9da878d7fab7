"""Which rows the executor suite prints, what kelp is compared with in each, and the bars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from perf.executor.contest import CaseResult
from perf.executor.engines import KELP, KELP_SPECULATING, LLAMA_CPP, TRANSFORMERS, VLLM
from perf.executor.process import EngineProcess
from perf.executor.workloads import CASES, COPY
from perf.rows import Comparison, Measurement, RequiredRow
from perf.stats import Pair, median, paired_ratio

BANDWIDTH = "bandwidth"
NO_SPECULATION = "no-speculation"
UNIT = "tokens/s"
_MEGABYTE = 1e6
_RESOURCES = (("load_s", "s"), ("peak_rss_mb", "MB"), ("weights_mb", "MB"))

_NAMES = {KELP: NO_SPECULATION}
"""What kelp itself is called where it is the reference."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Who is compared with whom in one row.

    Attributes:
        bar: Least acceptable ratio; None informs.
    """

    case: str
    contestant: str
    reference: str
    bar: float | None = None

    @property
    def reference_name(self) -> str:
        """As the metric spells it."""
        return _NAMES.get(self.reference, self.reference)


def _against_engines(case: str, vllm_bar: float, transformers_bar: float | None = None) -> Iterator[Duel]:
    yield Duel(case, KELP, VLLM, vllm_bar)
    yield Duel(case, KELP, TRANSFORMERS, transformers_bar)
    yield Duel(case, KELP, LLAMA_CPP)


DUELS = (
    *_against_engines("prefill_512", 0.8),
    *_against_engines("prefill_2048", 0.8),
    *_against_engines("decode_b1", 1.0),
    Duel("decode_b1", KELP, BANDWIDTH, 0.5),
    *_against_engines("decode_b8", 1.0, 2.0),
    Duel("decode_b8", KELP, BANDWIDTH),
    *_against_engines("decode_b32", 1.0, 2.0),
    Duel("decode_b32", KELP, BANDWIDTH),
    Duel(COPY.name, KELP_SPECULATING, KELP, 1.5),
)


def contestants_of(case: str) -> tuple[str, ...]:
    """Everybody who takes a turn in a case, bandwidth included."""
    names = [name for duel in DUELS if duel.case == case for name in (duel.contestant, duel.reference)]
    return tuple(dict.fromkeys(names))


def required_rows() -> Iterator[RequiredRow]:
    """Everything that a run must print."""
    for metric, unit in _RESOURCES:
        yield RequiredRow(KELP, metric, unit)
    for case in CASES:
        for duel in DUELS:
            if duel.case == case.name:
                yield RequiredRow(duel.case, f"tokens_per_s/{duel.reference_name}", UNIT, needs_reference=True)


def rows_of(result: CaseResult) -> Iterator[Measurement]:
    """The rows of one case: medians with the ratio, then bests, which only inform."""
    duels = [duel for duel in DUELS if duel.case == result.case.name]
    for duel in duels:
        yield _median_row(duel, result)
    for duel in duels:
        figures, references = result.figures.get(duel.contestant), result.figures.get(duel.reference)
        if figures and references:
            comparison = Comparison(duel.reference_name, max(references), None)
            yield Measurement(duel.case, f"tokens_per_s_best/{duel.reference_name}", UNIT, max(figures), comparison)


def _median_row(duel: Duel, result: CaseResult) -> Measurement:
    figures, references = result.figures.get(duel.contestant), result.figures.get(duel.reference)
    trouble = result.troubles.get(duel.contestant) or result.troubles.get(duel.reference) or ""
    comparison = None
    if figures and references:
        pairs = [Pair(value, reference) for value, reference in zip(figures, references, strict=False)]
        ratio = paired_ratio(pairs, is_lower_better=False)
        comparison = Comparison(duel.reference_name, median(references), ratio, duel.bar)
    value = median(figures) if figures else None
    return Measurement(duel.case, f"tokens_per_s/{duel.reference_name}", UNIT, value, comparison, trouble)


def resource_rows(engine: EngineProcess) -> Iterator[Measurement]:
    """What an engine takes; only informs."""
    values = (engine.load_s, engine.peak_rss_bytes / _MEGABYTE, engine.weights_bytes / _MEGABYTE)
    for (metric, unit), value in zip(_RESOURCES, values, strict=True):
        yield Measurement(engine.name, metric, unit, value)
