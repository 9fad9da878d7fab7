"""The main job through Triton: `llm` aggregated and disaggregated, what the relay costs, and how fast KV moves.

Both servers run side by side and take turns, since an idle one costs nothing that could be seen; the reference for
tokens/s takes its turns between them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from kelp.core.config import ModelConfig
from kelp.core.types import KVLayout
from perf.reporter import Reporter
from perf.rows import Comparison, Measurement, RequiredRow
from perf.serving import deployment, transformers_reference
from perf.serving.deployment import Deployment
from perf.serving.nixl_read import ReadSpec, measure_reads
from perf.serving.rounds import Contest, Level
from perf.serving.tables import MODES, RELAY, case_name, required_rows, rows_of
from perf.serving.transformers_reference import TransformersReference
from perf.stats import median, paired_ratio
from perf.suite import BenchError, Suite

_LEVEL_SIZES = ((1, 2), (8, 8), (32, 32))
"""Concurrency and requests per round."""

_NUM_ROUNDS = 5
_NUM_ROUNDS_LONG = 15
_NIXL = "nixl"
_NIXL_BLOCKS = (1, 16, 128)
_NIXL_PAIRS = 10
_BLOCK_SIZE = 16
_LEVEL_NAMES = tuple(f"c{concurrency}" for concurrency, _ in _LEVEL_SIZES)


def _model_folder() -> Path:
    folder = ModelConfig().path
    if not (folder / "config.json").is_file():
        raise BenchError(f"{folder}: no model here; run `make setup`")
    return folder


def _block_bytes(model_folder: Path) -> int:
    """Bytes of one KV block of the served model in bf16."""
    config = json.loads((model_folder / "config.json").read_text())
    layout = KVLayout(
        num_blocks=1,
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config["num_key_value_heads"],
        block_size=_BLOCK_SIZE,
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        dtype="bfloat16",
        model_id="",
    )
    return layout.block_bytes


def _nixl_metric(num_blocks: int) -> str:
    return f"read/{num_blocks}_blocks"


def _required() -> Iterator[RequiredRow]:
    for num_blocks in _NIXL_BLOCKS:
        yield RequiredRow(_NIXL, _nixl_metric(num_blocks), "GB/s", needs_reference=True)
    yield from required_rows(_LEVEL_NAMES)


def _run_nixl(reporter: Reporter, model_folder: Path) -> None:
    spec = ReadSpec(_block_bytes(model_folder), _NIXL_BLOCKS, _NIXL_PAIRS)
    try:
        found = measure_reads(spec)
    except BenchError as error:
        reporter.explain(_NIXL, str(error))
        return
    for num_blocks, pairs in found.items():
        copied = median([pair.reference for pair in pairs])
        comparison = Comparison("numpy memcpy", copied, paired_ratio(pairs, is_lower_better=False))
        value = median([pair.value for pair in pairs])
        reporter.add(Measurement(_NIXL, _nixl_metric(num_blocks), "GB/s", value, comparison))


def _start_servers(stack: ExitStack, reporter: Reporter, logs: Path) -> list[Deployment]:
    started = []
    for mode in MODES:
        try:
            started.append(stack.enter_context(deployment.running(mode, logs)))
        except BenchError as error:
            cases = [case_name(mode, level_name) for level_name in _LEVEL_NAMES]
            for case in (*cases, *([RELAY] if mode == MODES[0] else [])):
                reporter.explain(case, str(error))
        else:
            reporter.say(f"({mode} serves)")
    return started


def _start_reference(stack: ExitStack, model_folder: Path, logs: Path) -> TransformersReference:
    reference = stack.enter_context(transformers_reference.running(model_folder, logs))
    reference.wait_ready()
    return reference


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`."""
    model_folder = _model_folder()
    _run_nixl(reporter, model_folder)
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kelp-bench-")))
        servers = _start_servers(stack, reporter, logs)
        if not servers:
            return
        try:
            contest = Contest(servers, _start_reference(stack, model_folder, logs))
        except BenchError as error:
            contest = Contest(servers, None, str(error))
        for concurrency, num_requests in _LEVEL_SIZES:
            level = Level(concurrency, num_requests, _NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS)
            for measurement in rows_of(contest.run(level, reporter.say)):
                reporter.add(measurement)


SUITE = Suite(
    name="serve",
    summary="TTFT, ITL and tokens/s of llm, aggregated and disaggregated; relay and NIXL",
    required=tuple(_required()),
    run=run,
)
