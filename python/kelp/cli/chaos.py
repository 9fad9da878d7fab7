"""`kelp chaos`: faults by a seeded schedule under a verified load, and a report of what they did."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from kelp.chaos.faults import CLIENT_SIDE, FaultKind, Layout, kinds_for
from kelp.chaos.fleet_spec import FleetSpec, StoreSpec, quick_settings, usual_deadline_s
from kelp.chaos.report import Report
from kelp.chaos.runner import RunSpec, run_attached, run_served
from kelp.chaos.schedule import ScheduleSpec
from kelp.cli.options import sayer
from kelp.core.errors import ConfigError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)?")
_STORE = re.compile(r"([^:/]+):(\d+)/([^/]+)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PIPE_WIDTH = 160
_POOL_SIZES = {"mock": 200}
_RECORDED_POOL_SIZE = 12
"""Answers that nobody can compute are asked for before the first fault."""


def chaos_command(
    seed: Annotated[int, typer.Option(help="Of schedule and load; the same seed plays the same faults.")] = 0,
    duration: Annotated[str, typer.Option(help="Of the load: 60s, 30m, 2h.")] = "60s",
    rate: Annotated[float, typer.Option(help="Faults per second; at least one comes every 1 / RATE seconds.")] = 0.2,
    fault: Annotated[
        list[FaultKind] | None, typer.Option(help="Only this kind; may be repeated. All that apply by default.")
    ] = None,
    engine: Annotated[str, typer.Option(help="mock (answers are computed) or torch (answers are recorded).")] = "mock",
    layout: Annotated[Layout, typer.Option(help="One tritonserver for everything, or one per worker.")] = (
        Layout.ISOLATED
    ),
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers; 0 for workers that do both.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 2,
    routers: Annotated[int, typer.Option(min=1, help="Router processes.")] = 1,
    users: Annotated[int, typer.Option(min=1, help="Clients that ask again once answered.")] = 6,
    deadline: Annotated[
        str | None, typer.Option(help="Of requests that are to be answered: 60s (mock) or 180s by default.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="HOST:PORT/BUCKET of an S3-compatible store that runs; its faults are played, too."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder (default: SmolLM2-135M-Instruct).")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any field of the fleet: group.field=value.")] = (
        None
    ),
    attach: Annotated[
        str | None, typer.Option(help="Ask a running server at HOST:PORT (gRPC) instead: a client's faults alone.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Copy the fleet's logs into this folder.")] = None,
) -> None:
    """Break a fleet on purpose while every token of its answers is checked; status 1 if anything came of it."""
    say = sayer()
    for option, path in (("--json", json), ("--logs", logs)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}")
    fleet = FleetSpec(
        layout=layout,
        engine=engine,
        num_prefill=prefill,
        num_decode=decode,
        num_routers=routers,
        model=model,
        settings={**quick_settings(engine), **_settings(settings or [])},
        store=parse_store(store) if store else None,
    )
    kinds = tuple(fault) if fault else tuple(sorted(CLIENT_SIDE)) if attach else kinds_for(layout, store is not None)
    schedule = ScheduleSpec(seed, parse_duration_s(duration), rate, kinds, fleet.prefill_workers, fleet.decode_workers)
    is_computed = engine in _POOL_SIZES and attach is None
    deadline_s = parse_duration_s(deadline, "--deadline") if deadline else usual_deadline_s(engine)
    pool_size = _POOL_SIZES[engine] if is_computed else _RECORDED_POOL_SIZE
    spec = RunSpec(schedule, users, pool_size, deadline_s)
    options: dict[str, Any] = {
        "seed": seed, "duration_s": schedule.duration_s, "rate_per_s": rate, "engine": engine, "layout": layout.value,
        "prefill": prefill, "decode": decode, "routers": routers, "users": users, "deadline_s": deadline_s,
        "attach": attach, "store": store,
        "faults": [kind.value for kind in kinds],
    }  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    if attach is not None:
        report = run_attached(spec, attach, options, say)
    else:
        with tempfile.TemporaryDirectory(prefix="kelp-chaos-", ignore_cleanup_errors=True) as folder:
            report = run_served(spec, fleet, Path(folder), options, say, logs)
    _print(report)
    if json is not None:
        json.write_text(report.to_json())
    raise typer.Exit(0 if report.is_clean else 1)


def parse_store(text: str) -> StoreSpec:
    """An object store of `HOST:PORT/BUCKET`.

    Raises:
        ConfigError: It is something else.
    """
    found = _STORE.fullmatch(text)
    if found is None:
        raise ConfigError(f"--store {text!r}: must be HOST:PORT/BUCKET, for example 127.0.0.1:8333/kelp")
    return StoreSpec(found.group(1), int(found.group(2)), found.group(3))


def parse_duration_s(text: str, option: str = "--duration") -> float:
    """Seconds of `60s`, `30m`, `2h` or a plain number.

    Raises:
        ConfigError: It is something else.
    """
    found = _DURATION.fullmatch(text)
    if found is None or float(found.group(1)) == 0:
        raise ConfigError(f"{option} {text!r}: must be a number above 0 with s, m or h, for example 90s")
    return float(found.group(1)) * _SECONDS[found.group(2) or "s"]


def _settings(given: list[str]) -> dict[str, str]:
    settings = {}
    for setting in given:
        key, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting!r}: must be key=value, for example executor.block_size=32")
        settings[key] = value
    return settings


def _end(number: int, _frame: FrameType | None) -> None:
    # SystemExit passes through the event loop, so that the fleet is stopped on the way out.
    raise SystemExit(128 + number)


def _print(report: Report) -> None:
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for table in report.tables():
        console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False)
    console.print("clean" if report.is_clean else f"NOT clean; seed {report.options['seed']} plays it again")
