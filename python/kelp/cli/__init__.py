"""kelp: disaggregated LLM serving as a Triton model repository."""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import typer

from kelp.cli import chaos, eviction, kv, machine, router, serving, sim, traffic
from kelp.core.errors import KelpError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
_sim = typer.Typer(invoke_without_command=True)
_sim.callback()(sim.sim_command)
_sim.command("evict")(eviction.evict_command)
app.command("serve")(serving.serve_command)
app.command("supervise")(serving.supervise)
app.command("scale")(serving.scale)
app.command("drain")(serving.drain)
app.command("traffic")(traffic.traffic)
app.command("router")(router.router_command)
app.command("doctor")(machine.doctor_command)
app.add_typer(kv.kv_app, name="kv")
app.add_typer(_sim, name="sim")
app.command("chaos")(chaos.chaos_command)
app.command("version")(machine.version)


def main() -> NoReturn:
    """Entry point: a typed error is one line on standard error and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(message)s")
    try:
        app(standalone_mode=True)
    except KelpError as error:
        print(f"error: {error.text}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
