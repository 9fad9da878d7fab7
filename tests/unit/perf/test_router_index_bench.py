"""The index bench: its history, the answers to it, and what it reports without the peer."""

from __future__ import annotations

import io

import pytest
from perf.reporter import Reporter
from perf.router import index_bench, index_churn
from perf.router.index_kelp import KelpIndex
from perf.router.index_workload import QUERY_BLOCKS, History, IndexCase, Stored, make_history
from perf.rows import RunContext

_CASES = [IndexCase(8, 0, 20_000), IndexCase(8, 50, 20_000)]


def _residency(history: History) -> dict[int, set[int]]:
    held: dict[int, set[int]] = {}
    for event in history.events:
        blocks = held.setdefault(event.worker, set())
        if isinstance(event, Stored):
            assert event.parent == -1 or event.parent in blocks
            blocks.update(event.blocks)
        else:
            assert blocks.issuperset(event.blocks)
            blocks.difference_update(event.blocks)
    return held


def _leading(prompt: list[int], held: set[int]) -> int:
    return next((depth for depth, block in enumerate(prompt) if block not in held), len(prompt))


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_the_index_answers_the_bench_as_its_history_says(case: IndexCase) -> None:
    history = make_history(case)
    held = _residency(history)
    contender = KelpIndex()
    contender.prepare(history)
    contender.ingest()
    for length in QUERY_BLOCKS:
        prompts = [history.documents[document][:length] for document in history.queries[length]]
        truth = [{worker: _leading(prompt, blocks) for worker, blocks in held.items()} for prompt in prompts]
        assert contender.answers(length) == [{w: depth for w, depth in row.items() if depth} for row in truth]


def test_open_workers_and_only_they_lack_a_block_in_the_middle() -> None:
    closed, opened = (make_history(case) for case in _CASES)
    assert not any(_has_gap(document, held) for held in _residency(closed).values() for document in closed.documents)
    with_gap = {
        worker
        for worker, held in _residency(opened).items()
        if any(_has_gap(document, held) for document in opened.documents)
    }
    assert with_gap == {0, 1, 2, 3}


def _has_gap(document: list[int], held: set[int]) -> bool:
    return not held.isdisjoint(document[_leading(document, held) :])


def test_without_dynamo_its_rows_say_so(tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_bench, "PEER", tmp_path)
    monkeypatch.setattr(index_churn, "DAY_S", 40.0)
    context = RunContext("router", "commit", "machine", 0.0)
    reporter = Reporter(context, index_bench.REQUIRED, tmp_path / "rows.jsonl", io.StringIO())
    index_bench.run(reporter, False)
    reporter.add_missing()
    rows = (tmp_path / "rows.jsonl").read_text()
    assert rows.count("run make bench-peers") == len(index_bench.REQUIRED) - len(index_churn.REQUIRED)


def test_churn_stays_within_the_budget_and_leaves_next_to_nothing() -> None:
    result = index_churn.live_through(1600.0, budget_bytes=1 << 20)
    assert result.num_forgotten_blocks > 0
    assert result.peak_bytes <= 1 << 20
    assert result.left_bytes <= 1 << 17
