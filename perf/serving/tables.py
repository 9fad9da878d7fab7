"""Which rows the serve suite prints of a level, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator

from perf.rows import Comparison, Measurement, RequiredRow
from perf.serving import transformers_reference
from perf.serving.figures import METRICS, Metric, figures_of
from perf.serving.processes import SERVER
from perf.serving.rounds import CLIENT, LevelResult, Samples, pairs_of
from perf.serving.scrape import Total
from perf.stats import median, paired_ratio

AGGREGATED = "aggregated"
DISAGGREGATED = "disaggregated"
MODES = (AGGREGATED, DISAGGREGATED)
RELAY = "relay"
TTFT_PHASES = ("queue", "prefill", "relay")
SECOND_TOKEN_PHASES = ("transfer", "first_step")

RELAY_PROCESSES = {"client": CLIENT, "server": SERVER, "router_stub": "llm", "worker_stub": "decode"}
"""Metric name and process name; in aggregated serving the worker is the model `decode`."""

_SHARE = "of 1"
_PER_RESPONSE = "us/response"


def case_name(mode: str, level_name: str) -> str:
    """Such as `aggregated/c8`."""
    return f"{mode}/{level_name}"


def required_rows(level_names: tuple[str, ...]) -> Iterator[RequiredRow]:
    """Everything that `rows_of` must have printed for these levels."""
    for level_name in level_names:
        for mode in MODES:
            case = case_name(mode, level_name)
            for metric in METRICS:
                needs_reference = mode == DISAGGREGATED or metric.name == "tokens_per_s"
                yield RequiredRow(case, metric.name, metric.unit, needs_reference)
            yield from (RequiredRow(case, name, unit) for name, unit in _phase_rows(mode))
        for process in RELAY_PROCESSES:
            yield RequiredRow(RELAY, f"{process}_cpu/{level_name}", _PER_RESPONSE)
        yield RequiredRow(RELAY, f"responses_per_token/{level_name}", "")


def _phase_rows(mode: str) -> Iterator[tuple[str, str]]:
    yield "ttft_mean", "ms"
    yield from ((f"ttft_share/{phase}", _SHARE) for phase in TTFT_PHASES)
    if mode == DISAGGREGATED:
        yield "second_token_mean", "ms"
        yield from ((f"second_token_share/{phase}", _SHARE) for phase in SECOND_TOKEN_PHASES)


def rows_of(result: LevelResult) -> Iterator[Measurement]:
    """All rows of one level."""
    for mode, samples in result.samples.items():
        yield from _figure_rows(mode, samples, result)
        yield from _share_rows(mode, samples, result.level.name)
    if AGGREGATED in result.samples:
        yield from _relay_rows(result.samples[AGGREGATED], result.level.name)


def _figure_rows(mode: str, samples: Samples, result: LevelResult) -> Iterator[Measurement]:
    case = case_name(mode, result.level.name)
    figures = figures_of(samples.rounds)
    trouble = samples.complaint()
    for metric in METRICS:
        value = figures.get(metric.name)
        comparison = _compare(mode, metric, samples, result)
        yield Measurement(case, metric.name, metric.unit, value, comparison, trouble or _lack(mode, metric, result))


def _lack(mode: str, metric: Metric, result: LevelResult) -> str:
    if mode == AGGREGATED:
        return result.reference_trouble if metric.name == "tokens_per_s" else ""
    return "" if AGGREGATED in result.samples else "the reference, aggregated serving, could not be started"


def _compare(mode: str, metric: Metric, samples: Samples, result: LevelResult) -> Comparison | None:
    values = [figures_of([answers]).get(metric.name, 0.0) for answers in samples.rounds]
    if mode == AGGREGATED:
        if metric.name != "tokens_per_s" or not result.reference:
            return None
        ratio = paired_ratio(pairs_of(values, result.reference), metric.is_lower_better)
        return Comparison(transformers_reference.NAME, median(result.reference), ratio)
    other = result.samples.get(AGGREGATED)
    pooled = figures_of(other.rounds).get(metric.name) if other is not None else None
    if other is None or pooled is None or other.complaint():
        return None
    references = [figures_of([answers]).get(metric.name, 0.0) for answers in other.rounds]
    return Comparison(AGGREGATED, pooled, paired_ratio(pairs_of(values, references), metric.is_lower_better))


def _share_rows(mode: str, samples: Samples, level_name: str) -> Iterator[Measurement]:
    case = case_name(mode, level_name)
    trouble = samples.complaint() or _phase_trouble(mode, samples)
    phases = samples.times.phases if samples.times is not None else {}
    yield from _group(case, "ttft", [(phase, phases.get(phase, Total())) for phase in TTFT_PHASES], trouble)
    if mode == DISAGGREGATED:
        group = [(phase, phases.get(phase, Total())) for phase in SECOND_TOKEN_PHASES]
        yield from _group(case, "second_token", group, trouble)


def _group(case: str, what: str, phases: list[tuple[str, Total]], trouble: str) -> Iterator[Measurement]:
    """The mean of a span and the shares of the phases that it consists of."""
    total_s = sum(total.seconds for _, total in phases)
    count = max(total.count for _, total in phases)
    mean_ms = total_s / count * 1e3 if count else None
    yield Measurement(case, f"{what}_mean", "ms", mean_ms, trouble=trouble)
    for phase, total in phases:
        share = total.seconds / total_s if total_s > 0 else None
        yield Measurement(case, f"{what}_share/{phase}", _SHARE, share, trouble=trouble)


def _phase_trouble(mode: str, samples: Samples) -> str:
    if samples.times is None:
        return "the server's metrics were not read"
    needed = TTFT_PHASES + (SECOND_TOKEN_PHASES if mode == DISAGGREGATED else ())
    num_requests = len(samples.answers())
    for phase in needed:
        count = samples.times.phases.get(phase, Total()).count
        if count != num_requests:
            return f"the server's metrics have phase {phase} of {count} of {num_requests} requests"
    return ""


def _relay_rows(samples: Samples, level_name: str) -> Iterator[Measurement]:
    answers = samples.answers()
    num_responses = sum(answer.num_responses for answer in answers)
    num_tokens = sum(answer.num_tokens for answer in answers)
    trouble = samples.complaint()
    for metric, process in RELAY_PROCESSES.items():
        name = f"{metric}_cpu/{level_name}"
        seconds = samples.cpu_s.get(process)
        if seconds is None or not num_responses:
            yield Measurement(RELAY, name, _PER_RESPONSE, None, trouble=trouble or f"no process {process} was found")
        else:
            yield Measurement(RELAY, name, _PER_RESPONSE, seconds / num_responses * 1e6, trouble=trouble)
    ratio = num_responses / num_tokens if num_tokens else None
    yield Measurement(RELAY, f"responses_per_token/{level_name}", "", ratio, trouble=trouble)
