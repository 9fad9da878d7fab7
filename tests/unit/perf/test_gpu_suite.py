from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from perf.executor.contest import CaseResult
from perf.gpu.workloads import BANDWIDTH, CASES, KELP, TRANSFORMERS, make_job, rows_of
from perf.reporter import Reporter
from perf.rows import RunContext
from perf.run import run_suite
from perf.suites.gpu import SUITE

DECODE = next(case for case in CASES if case.name == "decode_b8")
PREFILL = next(case for case in CASES if case.is_prefill)


def test_without_a_device_every_required_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "gpu.jsonl"
    reporter = Reporter(RunContext("gpu", "commit", "machine", 0.0), SUITE.required, path, io.StringIO())
    assert not run_suite(SUITE, reporter, is_long=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["case"], row["metric"]) for row in rows} == {(row.case, row.metric) for row in SUITE.required}
    assert {(row["ok"], row["reason"]) for row in rows} == {(False, "no CUDA device")}


def test_decoding_is_compared_with_transformers_and_with_the_bandwidth():
    figures = {KELP: [100.0] * 5, TRANSFORMERS: [50.0] * 5, BANDWIDTH: [200.0] * 5}
    rows = {row.metric: row for row in rows_of(CaseResult(DECODE, figures))}
    assert rows["tokens_per_s/transformers"].comparison.ratio.value == pytest.approx(2.0)
    assert rows["tokens_per_s/bandwidth"].comparison.ratio.value == pytest.approx(0.5)


def test_prefill_is_not_bounded_by_the_bandwidth():
    (row,) = rows_of(CaseResult(PREFILL, {KELP: [100.0] * 5, TRANSFORMERS: [50.0] * 5}))
    assert row.metric == "tokens_per_s/transformers"


def test_a_reference_in_trouble_is_named_and_the_figure_kept():
    result = CaseResult(PREFILL, {KELP: [100.0]}, {TRANSFORMERS: "transformers: out of memory"})
    (row,) = rows_of(result)
    assert (row.value, row.comparison, row.trouble) == (100.0, None, "transformers: out of memory")


def test_jobs_repeat_with_their_seed_and_share_no_first_block_otherwise():
    job = make_job(DECODE, 128_256, seed=1)
    assert job == make_job(DECODE, 128_256, seed=1)
    assert len(job.prompts) == 8
    assert {len(prompt) for prompt in job.prompts} == {128}
    assert len({prompt[:16] for seed in range(3) for prompt in make_job(DECODE, 128_256, seed).prompts}) == 24
