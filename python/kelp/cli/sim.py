"""`kelp sim`: options in, a table and files out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kelp.core.errors import ConfigError
from kelp.sim.comparison import Comparison, Conditions, compare, run_policy
from kelp.sim.contestants import Contestant, parse_contestant
from kelp.sim.fleet import FleetSpec, NetworkSpec, TruthSpec
from kelp.sim.pacing import at_rate, part_of
from kelp.sim.plots import require_matplotlib, write_html, write_png
from kelp.sim.report import SLA
from kelp.sim.report_table import to_table
from kelp.sim.requests import Workload
from kelp.sim.sessions import make_sessions
from kelp.sim.traces import read_trace

_NUM_SESSION_REQUESTS = 2000
_SESSION_RATE = 8.0
_SESSION_BLOCK_SIZE = 64
_DEFAULT_POLICIES = ("kelp", "dynamo", "sglang", "least-loaded", "round-robin")
_PIPE_WIDTH = 140
_SECONDS = 1e-3


@dataclass(frozen=True, slots=True)
class _Outputs:
    json: Path | None
    html: Path | None
    png: Path | None

    def check(self) -> None:
        """Find out before the run what would fail after it."""
        if self.html or self.png:
            require_matplotlib()
        for option, path in (("--json", self.json), ("--html", self.html), ("--png", self.png)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}")

    def write(self, comparison: Comparison) -> None:
        if self.json is not None:
            try:
                self.json.write_text(comparison.report.to_json())
            except OSError as error:
                raise ConfigError(f"--json {self.json}: {error.strerror}") from None
        if self.html is not None:
            write_html(self.html, comparison.report, comparison.curves)
        if self.png is not None:
            write_png(self.png, comparison.report, comparison.curves)


def sim_command(
    context: typer.Context,
    trace: Annotated[Path | None, typer.Option(help="Replay a Mooncake trace: .jsonl or .jsonl.gz.")] = None,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Play generated chats, agents and document questions (the default).")
    ] = False,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many of a trace; of sessions 2000, or as many.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Mean requests/s; as recorded if not given, 8 for sessions.")
    ] = None,
    spread_s: Annotated[
        float, typer.Option(min=0.0, help="Spread a trace's coarse timestamps over so many seconds (conversation: 3).")
    ] = 0.0,
    workers: Annotated[int, typer.Option(min=0, help="Aggregated workers.")] = 8,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers, beside or instead of --workers.")] = 0,
    decode: Annotated[int, typer.Option(min=0, help="Decode workers, beside or instead of --workers.")] = 0,
    blocks: Annotated[int, typer.Option(min=1, help="KV blocks per worker: 512 tokens for traces.")] = 2048,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens per block of sessions (64); traces come with 512.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A policy, with fields if need be (dynamo,temperature=0.5); may be repeated. Five of them by default."
        ),
    ] = None,
    routers: Annotated[int, typer.Option(min=1, help="Router replicas that take turns.")] = 1,
    bias: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Workers are up to this share slower or faster than modelled.")
    ] = 0.2,
    events_loss: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of KV event messages that get lost.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal results.")] = 0,
    sla_ttft_ms: Annotated[float, typer.Option(help="A request is good if its first token came in time,")] = 5000.0,
    sla_itl_ms: Annotated[float, typer.Option(help="and each further token in so much on average.")] = 200.0,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report with plots as one page (extra `plots`).")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the plots (extra `plots`).")] = None,
) -> None:
    """Judge routing policies: the real router and scheduler on a virtual clock."""
    if context.invoked_subcommand is not None:
        return
    outputs = _Outputs(json, html, png)
    outputs.check()
    contestants = [parse_contestant(text) for text in policy or _DEFAULT_POLICIES]
    _refuse_twins(contestants)
    if trace is not None and (sessions or block_size is not None):
        raise ConfigError(f"--trace {trace}: does not go with {'--sessions' if sessions else '--block-size'}")
    if not workers and not (prefill and decode):
        raise ConfigError("--workers 0: give some, or both --prefill and --decode")
    sla = SLA(sla_ttft_ms * _SECONDS, sla_itl_ms * _SECONDS)
    fleet = FleetSpec(
        num_workers=workers,
        num_prefill=prefill,
        num_decode=decode,
        num_blocks=blocks,
        truth=TruthSpec(bias=bias),
        network=NetworkSpec(events_loss=events_loss),
        num_routers=routers,
    )
    with interruptible():
        if trace is not None:
            workload = _trace(trace, requests, rate, spread_s, seed)
        else:
            num_requests, session_rate = requests or _NUM_SESSION_REQUESTS, rate if rate is not None else _SESSION_RATE
            workload = make_sessions(num_requests, session_rate, seed, block_size=block_size or _SESSION_BLOCK_SIZE)
        _refuse_long(workload, fleet)
        options = _options(fleet, seed, spread_s if trace is not None else 0.0)
        comparison = _compare(Conditions(workload, fleet, seed, sla, options), contestants)
        console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
        console.print(to_table(comparison.report))
        outputs.write(comparison)


def _trace(path: Path, requests: int | None, rate: float | None, spread_s: float, seed: int) -> Workload:
    workload = read_trace(path, spread_s, seed)
    if requests is not None and requests < len(workload.requests):
        workload = part_of(workload, 0.0, requests / len(workload.requests))
    return at_rate(workload, rate) if rate is not None else workload


def _options(fleet: FleetSpec, seed: int, spread_s: float) -> dict[str, Any]:
    return {
        "workers": fleet.num_workers,
        "prefill": fleet.num_prefill,
        "decode": fleet.num_decode,
        "blocks": fleet.num_blocks,
        "routers": fleet.num_routers,
        "bias": fleet.truth.bias,
        "events_loss": fleet.network.events_loss,
        "seed": seed,
        "spread_s": spread_s,
    }


def _refuse_twins(contestants: list[Contestant]) -> None:
    labels = [contestant.label for contestant in contestants]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"--policy {label}: given twice")


def _refuse_long(workload: Workload, fleet: FleetSpec) -> None:
    """A request that fits into no worker would never be served."""
    longest = max(request.num_prompt_tokens + request.num_output_tokens for request in workload.requests)
    num_needed = -(-longest // workload.block_size)
    if num_needed > fleet.num_blocks:
        raise ConfigError(
            f"--blocks {fleet.num_blocks}: the longest request takes {num_needed} of {workload.block_size}"
        )


def _compare(conditions: Conditions, contestants: list[Contestant]) -> Comparison:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        total = len(conditions.workload.requests)
        tasks = {contestant.label: progress.add_task(contestant.label, total=total) for contestant in contestants}

        def watch(contestant: Contestant) -> Any:
            task = tasks[contestant.label]
            return lambda arrived, _: progress.update(task, completed=arrived)

        return compare(conditions, contestants, run_policy, watch)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM end the command at once: no traceback, status 128 + signal, no half-written file."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise typer.Exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
