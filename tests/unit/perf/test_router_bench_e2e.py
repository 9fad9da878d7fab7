"""The router suite's end-to-end half: what answers add up to, and the rows and bars that come of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from perf.router import e2e, e2e_model
from perf.router.e2e_figures import METRICS, Figures, figures_of
from perf.router.loadgen import LoadResult
from perf.router.loadgen_connection import Answer
from perf.rows import judge
from perf.suite import BenchError
from tokenizers import Tokenizer


def answer(first_ms: float, error: str = "") -> Answer:
    return Answer(
        start_s=1.0, first_s=1.0 + first_ms / 1e3, end_s=2.0, num_input_tokens=512, num_output_tokens=64, num_events=4,
        error=error,
    )  # fmt: skip


def figures(**changes: float) -> Figures:
    fields = dict.fromkeys(Figures.__slots__, 1.0)
    return Figures(**{**fields, **changes})


def test_figures_are_per_request_and_per_second() -> None:
    load = LoadResult((answer(1.0), answer(3.0), answer(2.0), answer(4.0)), wall_s=2.0, client_cpu_s=0.4)
    found = figures_of(load, server_cpu_s=0.02)
    assert (found.requests_per_s, found.tokens_per_s) == (2.0, 128.0)
    assert math.isclose(found.ttft_p50_ms, 2.5, rel_tol=1e-6)
    assert math.isclose(found.cpu_per_request_us, 5000.0)
    assert math.isclose(found.client_cpu_per_request_us, 100_000.0)
    assert found.events_per_request == 4.0


@pytest.mark.parametrize("answers", [(), (answer(1.0), answer(1.0, error="cut short"))], ids=["none", "one failed"])
def test_a_load_with_failures_has_no_figures(answers: tuple[Answer, ...]) -> None:
    with pytest.raises(BenchError, match="cut short" if answers else "nothing was sent"):
        figures_of(LoadResult(answers, 1.0, 0.1), server_cpu_s=0.1)


def test_every_required_row_of_a_level_is_measured_against_the_peer() -> None:
    rounds = [(figures(), figures()) for _ in range(5)]
    for level in e2e.LEVELS:
        made = {
            row.metric: row
            for client in (e2e.QUICK_ACK, e2e.PLAIN)
            for row in e2e.measurements(level.case, client, rounds)
        }
        required = {row.metric for row in e2e.REQUIRED if row.case == level.case}
        assert made.keys() == required
        assert all(judge(row, needs_reference=True).is_measured for row in made.values())


def test_each_row_names_both_protocols_and_the_kind_of_client() -> None:
    (first, *_) = e2e.measurements("e2e_c1", e2e.PLAIN, [(figures(), figures())] * 5)
    assert first.comparison is not None
    for part in ("generate-stream", "openai-sse", "plain client"):
        assert part in first.comparison.reference


@pytest.mark.parametrize(
    ("case", "metric", "ours", "is_ok"),
    [
        ("e2e_c1", "ttft_p50_ms", 1.0, True),
        ("e2e_c1", "ttft_p50_ms", 1.1, False),
        ("e2e_c64", "ttft_p50_ms", 9.0, True),
        ("e2e_c64", "tokens_per_s", 0.5, True),
        ("e2e_c64", "tokens_per_s", 0.49, False),
        ("e2e_c1", "tokens_per_s", 0.1, True),
    ],
)
def test_the_bars_are_ttft_at_one_request_and_tokens_at_sixty_four(
    case: str, metric: str, ours: float, is_ok: bool
) -> None:
    rounds = [(figures(**{metric: ours}), figures())] * 5
    verdicts = {row.metric: judge(row, True) for row in e2e.measurements(case, e2e.QUICK_ACK, rounds)}
    assert all(verdict.is_ok for verdict in verdicts.values()) is is_ok


def test_a_bar_of_the_quick_client_is_none_of_the_plain_one() -> None:
    rounds = [(figures(ttft_p50_ms=9.0), figures())] * 5
    assert all(judge(row, True).is_ok for row in e2e.measurements("e2e_c1", e2e.PLAIN, rounds))


def test_metrics_that_are_better_when_small_count_so() -> None:
    assert {metric.name for metric in METRICS if not metric.is_lower_better} == {"tokens_per_s", "requests_per_s"}


@pytest.mark.slow
def test_prompts_have_the_asked_length_and_do_not_repeat(tmp_path: Path) -> None:
    folder = e2e_model.build(tmp_path / "tiny")
    assert e2e_model.build(folder) == folder
    prompts = e2e_model.Prompts(folder, num_tokens=512, seed=1).take(8)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lengths = [len(tokenizer.encode(prompt).ids) + e2e_model.TEMPLATE_TOKENS for prompt in prompts]
    assert all(abs(length - 512) <= 8 for length in lengths)
    assert len(set(prompts)) == 8
