from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kelp.cli import app
from kelp.core.errors import ConfigError

SAMPLE = Path(__file__).parents[3] / "perf" / "sim" / "sample" / "mooncake_synthetic_200.jsonl.gz"


def sim(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, ["sim", *arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, ["sim", *arguments], catch_exceptions=False)
    return caught.value.text


def test_sessions_are_played_without_any_argument_but_a_size() -> None:
    shown = sim("--requests", "60", "--workers", "2", "--policy", "kelp", "--policy", "round-robin")
    assert "sessions: 60 requests" in shown and "kelp" in shown and "round-robin" in shown


def test_a_trace_is_replayed_at_a_rate_and_reported_as_json(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    sim(
        "--trace",
        str(SAMPLE),
        "--requests",
        "50",
        "--rate",
        "4",
        "--policy",
        "dynamo,temperature=0.2",
        "--json",
        str(target),
    )
    report = json.loads(target.read_text())
    assert report["setting"]["num_requests"] == 50
    assert report["setting"]["rate_rps"] == pytest.approx(4.0)
    assert [policy["policy"] for policy in report["policies"]] == ["dynamo,temperature=0.2"]
    assert report["policies"][0]["num_refused"] == 0


def test_the_same_seed_writes_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json", "other.json")]
    for path, seed in zip(files, ("3", "3", "4"), strict=True):
        sim("--requests", "60", "--workers", "2", "--policy", "kelp", "--seed", seed, "--json", str(path))
    one, two, other = (path.read_bytes() for path in files)
    assert one == two != other


def test_prefill_and_decode_workers_can_stand_for_aggregated_ones() -> None:
    sim("--requests", "20", "--workers", "0", "--prefill", "1", "--decode", "1", "--policy", "least-loaded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "best"], "--policy 'best': 'best' is none of kelp, dynamo"),
        (["--policy", "dynamo,temperature=warm"], "'temperature=warm' must be field=number"),
        (["--policy", "dynamo,colour=1"], "dynamo has no 'colour'"),
        (["--policy", "kelp", "--policy", "kelp"], "--policy kelp: given twice"),
        (["--rate", "0"], "--rate 0"),
        (["--trace", "nowhere.jsonl"], "--trace nowhere.jsonl: No such file"),
        (["--trace", str(SAMPLE), "--sessions"], "does not go with --sessions"),
        (["--trace", str(SAMPLE), "--block-size", "16"], "does not go with --block-size"),
        (["--json", "/nowhere/report.json"], "--json /nowhere/report.json: there is no folder /nowhere"),
        (["--sla-ttft-ms", "0"], "--sla-ttft-ms 0"),
        (["--blocks", "10"], "--blocks 10: the longest request takes"),
        (["--workers", "0", "--prefill", "1"], "--workers 0: give some"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(arguments: list[str], message: str) -> None:
    assert message in refusal(*arguments)


def test_every_option_is_explained_once() -> None:
    shown = sim("--help")
    for option in ("--trace", "--sessions", "--workers", "--blocks", "--policy", "--seed", "--rate", "--html", "--png"):
        assert option in shown


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_long_run_without_a_traceback(number: signal.Signals, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests_sim_entry", "sim", "--requests", "20000", "--rate", "50"]
    (tmp_path / "tests_sim_entry.py").write_text(
        "import signal, sys\n"
        "from kelp.cli import main, sim\n"
        "real = sim.compare\n"
        "def compare(*args):\n"
        "    print('running', flush=True)\n"
        "    return real(*args)\n"
        "sim.compare = compare\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [*command, "--json", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    _, trouble = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in trouble and not target.exists()
