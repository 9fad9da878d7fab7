"""Runs fuzzing processes for a time each, a few at once, and says what they did and found.

    python -m fuzz.campaign [--minutes M] [--jobs N] [--folder F] [FAMILY ...]

One line per family: executions, CPU time, coverage, findings, memory. Corpora stay in the folder, so each campaign goes
on where the last one ended. Exit status 1 with findings, 143 when ended by SIGTERM, which leaves no process behind.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from fuzz.families import FAMILIES
from fuzz.process import OUTCOMES

_TESTS = Path(__file__).resolve().parents[1]
_ROOT = _TESTS.parent
_PR_SET_PDEATHSIG = 1
_SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where processes have their files: nothing there waits for a disk."""
_LEAST_S = 5.0
_FAREWELL_S = 5.0
_MAX_STOPS = 10
"""After so many hangs or crashes of native code a family is left alone: one of them repeats."""
_STARTED = re.compile(rb"cov: (\d+)")
_RUNS = re.compile(rb"number_of_executed_units: (\d+)")


@dataclass
class Tally:
    """What the processes of one family did."""

    num_runs: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    num_edges: int = 0
    num_outcomes: int = 0
    num_stops: int = 0
    failures: list[str] = field(default_factory=list)


class Campaign:
    """See the module docstring.

    Args:
        folder: One below it for each family.
        seconds: Of wall-clock time for each family.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._seconds = seconds
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.is_stopped = False

    def stop(self) -> None:
        """End all processes; they say what they have done so far."""
        self.is_stopped = True
        for process in list(self._running):
            process.terminate()

    def run(self, name: str) -> bool:
        """Run a family for its time; whether nothing was found."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("finding-*"), *folder.glob("stopped-*")]:
            path.unlink()
        tally = Tally()
        end_s = time.monotonic() + self._seconds
        while not self.is_stopped and tally.num_stops < _MAX_STOPS and not tally.failures:
            left_s = end_s - time.monotonic()
            if left_s < min(_LEAST_S, self._seconds) and tally.wall_s:
                break
            self._once(name, folder, left_s, tally)
        findings = sorted([*folder.glob("finding-*.bin"), *folder.glob("stopped-*")])
        if tally.wall_s:
            print(_line(name, tally, len(findings)), flush=True)
        for path in findings:
            print(f"  {_reason(path)}\n    replay: {_replay(name, path)}", flush=True)
        for failure in tally.failures:
            print(f"  {name} could not run: {failure}", flush=True)
        return not findings and not tally.failures

    def _once(self, name: str, folder: Path, seconds: float, tally: Tally) -> None:
        """One process, until its time is over or it stops."""
        begun_s, num_stopped = time.monotonic(), len(list(folder.glob("stopped-*")))
        command = [sys.executable, "-m", "fuzz.process", name, str(folder), str(seconds)]
        log = folder / "log"
        with log.open("wb") as output, tempfile.TemporaryDirectory(prefix="fuzz-", dir=_SCRATCH) as scratch:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment(scratch), cwd=_ROOT,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
            self._running.add(process)
            if self.is_stopped:
                process.terminate()
            status, usage = _ended(process, seconds)
            self._running.discard(process)
        tally.wall_s += time.monotonic() - begun_s
        tally.cpu_s += usage.ru_utime + usage.ru_stime
        tally.peak_bytes = max(tally.peak_bytes, usage.ru_maxrss * 1024)
        text = log.read_bytes()
        tally.num_runs += int((_RUNS.findall(text) or [b"0"])[-1])
        outcomes = folder / OUTCOMES
        tally.num_outcomes = max(tally.num_outcomes, int(outcomes.read_text() or 0) if outcomes.exists() else 0)
        tally.num_edges = max(tally.num_edges, int((_STARTED.findall(text) or [b"0"])[-1]))
        log.unlink()
        if len(list(folder.glob("stopped-*"))) > num_stopped:
            tally.num_stops += 1
        elif status and not self.is_stopped:
            tally.failures.append(text[-2000:].decode(errors="replace").strip() or f"exit status {status}")


def _ended(process: subprocess.Popen[bytes], seconds: float) -> tuple[int, object]:
    """Wait, kill it when it is far beyond its time; its status and what it used."""
    timer = threading.Timer(2 * seconds + 120, process.kill)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def _environment(scratch: str) -> dict[str, str]:
    """The tests' folder holds the package that this module is of; libFuzzer leaves without tidying up."""
    return {**os.environ, "TMPDIR": scratch, "PYTHONPATH": str(_TESTS)}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def _line(name: str, tally: Tally, num_findings: int) -> str:
    # libFuzzer counts an outcome like an edge of the code.
    num_edges = max(0, tally.num_edges - tally.num_outcomes)
    return (
        f"fuzz: {name}: {tally.num_runs} executions, {tally.num_runs / tally.wall_s:.0f}/s, {tally.wall_s:.0f} s, "
        f"{tally.cpu_s:.0f} CPU s, {num_edges} edges, {tally.num_outcomes} kinds of outcome, {num_findings} findings, "
        f"peak {tally.peak_bytes / 2**20:.0f} MiB"
    )


def _reason(path: Path) -> str:
    text = path.with_suffix(".txt")
    return f"{text.read_text().splitlines()[0]}: {path}" if text.exists() else f"hang or crash: {path}"


def _replay(name: str, path: Path) -> str:
    return f"PYTHONPATH={_TESTS} {sys.executable} -m fuzz.process {name} {path.parent} 0 {path}"


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="fuzz.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"all by default: {', '.join(FAMILIES)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each family")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    parser.add_argument("--folder", type=Path, default=_ROOT / "perf" / "results" / "fuzz")
    asked = parser.parse_args()
    unknown = set(asked.families) - set(FAMILIES)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such family; there are: {', '.join(FAMILIES)}")
    if find_spec("atheris") is None:
        print("fuzz: atheris is not installed: inputs are changed blindly, edges are not counted")
    names = asked.families or list(FAMILIES)
    campaign = Campaign(asked.folder, asked.minutes * 60)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: campaign.stop())
    with ThreadPoolExecutor(asked.jobs) as pool:
        futures = [pool.submit(campaign.run, name) for name in names]
        while not all(future.done() for future in futures):
            time.sleep(0.2)
    is_clean = [future.result() for future in futures]
    if campaign.is_stopped:
        print("fuzz: stopped")
        return 128 + signal.SIGTERM
    print(f"fuzz: {len(names)} families, {is_clean.count(False)} with findings (inputs and corpora: {asked.folder})")
    return 0 if all(is_clean) else 1


if __name__ == "__main__":
    sys.exit(main())
