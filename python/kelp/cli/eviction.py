"""`kelp sim evict`: eviction policies of the KV block manager on traces and sessions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kelp.cli.sim import interruptible
from kelp.core.config_kv import EvictionName
from kelp.core.errors import ConfigError
from kelp.kv.eviction.catalogue import POLICY_NAMES
from kelp.sim.eviction import DEFAULT_SIZES, DEFAULT_UPPER, Stream, Watch, make_stream
from kelp.sim.eviction_report import EvictionRow, evaluate, to_json, to_table
from kelp.sim.pacing import halves, part_of
from kelp.sim.requests import Workload
from kelp.sim.sessions import make_sessions
from kelp.sim.traces import read_trace

_NUM_SESSION_REQUESTS = 8000
_SESSION_RATE = 8.0
_PERCENT = 0.01
_PIPE_WIDTH = 160
_PROGRESS_STEP = 100


def evict_command(
    trace: Annotated[
        list[Path] | None, typer.Option(help="Replay a Mooncake trace (.jsonl or .jsonl.gz); may be repeated.")
    ] = None,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Play generated sessions too; without any trace they are the default.")
    ] = False,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many of a trace; of sessions 8000, or as many.")
    ] = None,
    second_half: Annotated[
        bool, typer.Option("--second-half", help="Only the second half of each workload: the first one was tuned on.")
    ] = False,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block of sessions; traces come with 512.")] = 128,
    upper: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="Blocks of the tier above, in % of the unique ones; 0: none.")
    ] = DEFAULT_UPPER / _PERCENT,
    size: Annotated[
        list[float] | None, typer.Option(help="Blocks of the tier, in % of the unique ones; may be repeated.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(POLICY_NAMES)}; may be repeated. All by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sessions.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
) -> None:
    """Judge eviction policies by the prefill time that a tier below the workers' own blocks saves."""
    sizes = [_size(percent) for percent in size] if size else list(DEFAULT_SIZES)
    policies = [_policy(name) for name in policy or POLICY_NAMES]
    if json is not None and not json.absolute().parent.is_dir():
        raise ConfigError(f"--json {json}: there is no folder {json.absolute().parent}")
    rows: list[EvictionRow] = []
    with interruptible():
        for workload in _workloads(trace or [], sessions, requests, (block_size, seed)):
            played = halves(workload)[1] if second_half else workload
            rows += _evaluate(make_stream(played, upper * _PERCENT), sizes, policies)
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(to_table(rows))
        if json is not None:
            try:
                json.write_text(to_json(rows))
            except OSError as error:
                raise ConfigError(f"--json {json}: {error.strerror}") from None


def _size(percent: float) -> float:
    if not 0 < percent <= 100:
        raise ConfigError(f"--size {percent}: must be above 0 and at most 100")
    return percent * _PERCENT


def _policy(name: str) -> EvictionName:
    for known in POLICY_NAMES:
        if known == name:
            return known
    raise ConfigError(f"--policy {name}: must be one of {', '.join(POLICY_NAMES)}")


def _workloads(
    traces: list[Path], has_sessions: bool, requests: int | None, drawing: tuple[int, int]
) -> Iterator[Workload]:
    for path in traces:
        workload = read_trace(path)
        num_requests = min(requests or len(workload.requests), len(workload.requests))
        yield part_of(workload, 0.0, num_requests / len(workload.requests))
    if has_sessions or not traces:
        block_size, seed = drawing
        yield make_sessions(requests or _NUM_SESSION_REQUESTS, _SESSION_RATE, seed, block_size=block_size)


def _evaluate(stream: Stream, sizes: list[float], policies: list[EvictionName]) -> list[EvictionRow]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = len(stream.requests) * len(sizes) * len(policies)
        task = progress.add_task(stream.name, total=total)
        played = 0

        def watch_of(size: float, name: str) -> Watch:
            nonlocal played
            before = played
            played += len(stream.requests)
            progress.update(task, description=f"{stream.name} {size:.1%} {name}")
            return lambda count: None if count % _PROGRESS_STEP else progress.update(task, completed=before + count)

        return list(evaluate(stream, sizes, policies, watch_of))
