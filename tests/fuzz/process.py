"""One fuzzing process: runs a family until its time is over, and notes what it finds.

Coverage-guided by atheris where that is installed, blind otherwise. An exception is noted and fuzzing goes on; what
libFuzzer itself stops for (time, a crash of native code) ends the process, which the campaign then starts anew.

    python -m fuzz.process FAMILY FOLDER SECONDS [INPUT]

With INPUT, the family is run once over that file and everything raised is shown.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import random
import resource
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuzz.parsers import Family

SLOW_S = 2.0
"""CPU time that no input may take."""
TIMEOUT_S = 60
"""After which an input counts as hanging: wall-clock time, of a process that gives way to all others."""
MAX_INPUT_BYTES = 8192
GROWTH_BYTES = 64 * 1024 * 1024
"""By which one input may raise the process's peak of memory, and by `GROWTH_PER_BYTE` for each of its bytes."""
GROWTH_PER_BYTE = 1024
RSS_LIMIT_MB = 2048
ADDRESS_SPACE_BYTES = 16 * 1024**3
OUTCOMES = "outcomes"
"""File that says how many kinds of outcome have been seen; they count as coverage beside the code's edges."""
_NUM_OUTCOMES = 32768
_PACKAGE = str(Path("python", "kelp"))


class Notebook:
    """Findings of one process, one file for each place that raises.

    Args:
        folder: Where inputs and tracebacks go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[str] = set()

    def note(self, data: bytes, error: BaseException) -> None:
        """Keep the first input for each kind of error and place."""
        place = _place(error)
        if place in self._known:
            return
        self._known.add(place)
        name = hashlib.sha1(place.encode()).hexdigest()[:12]
        path = self._folder / f"finding-{name}.bin"
        if not path.exists():
            path.write_bytes(data)
            path.with_suffix(".txt").write_text(
                f"{place}\n\n{''.join(traceback.format_exception(error))}", "utf-8", "replace"
            )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if _PACKAGE in frame.filename] or frames
    return f"{type(error).__name__} in {inner[-1].filename}:{inner[-1].name}" if inner else type(error).__name__


class Watched:
    """What is fuzzed: a family whose outcomes count as coverage, and whose exceptions and memory are noted."""

    def __init__(self, run: Callable[[bytes], str], notebook: Notebook, trace: Callable[[str], None]) -> None:
        self._run = run
        self._notebook = notebook
        self._trace = trace
        self.num_runs = 0
        self._peak_bytes = _peak_bytes()

    def __call__(self, data: bytes) -> None:
        self.num_runs += 1
        begun_s = time.process_time()
        try:
            self._trace(self._run(data))
        except Exception as error:
            self._notebook.note(data, error)
            self._trace(_place(error))
        taken_s = time.process_time() - begun_s
        if taken_s > SLOW_S:
            self._notebook.note(data, TimeoutError(f"{len(data)} bytes took {taken_s:.1f} s of CPU time"))
        peak_bytes = _peak_bytes()
        grown = peak_bytes - self._peak_bytes
        self._peak_bytes = peak_bytes
        if grown > GROWTH_BYTES + GROWTH_PER_BYTE * len(data) and self.num_runs > 1:
            self._notebook.note(data, MemoryError(f"{len(data)} bytes took {grown} bytes more than any input before"))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _family(name: str) -> Family:
    family: Family = importlib.import_module("fuzz.families").FAMILIES[name]
    # What its parsers load and keep at their first use is nothing that an input takes.
    for seed in family.seeds:
        with suppress(Exception):
            family.run(seed)
    return family


def _guided(name: str, folder: Path, seconds: float) -> None:
    import atheris

    counters = [atheris._reserve_counter() for _ in range(_NUM_OUTCOMES)]
    with atheris.instrument_imports(["kelp"], enable_loader_override=False):
        family = _family(name)
    from fuzz.mutation import mutate, mutate_bytes

    seen: set[int] = set()

    def trace(outcome: str) -> None:
        number = zlib.crc32(outcome.encode("utf-8", "replace")) % _NUM_OUTCOMES
        atheris._trace_branch(counters[number])
        if number not in seen:
            # At once, because libFuzzer leaves without Python's farewells.
            seen.add(number)
            outcomes.write_text(str(len(seen)))

    outcomes = folder / OUTCOMES

    def change(body: bytes, rng: random.Random) -> bytes:
        return atheris.Mutate(body, MAX_INPUT_BYTES) if rng.randrange(4) else mutate_bytes(body, rng)

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        return mutate(family, data, seed, change)[:max_size]

    corpus = _corpus(folder, family.seeds)
    options = [
        f"-max_total_time={max(1, int(seconds))}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={folder}/stopped-", "-print_final_stats=1", "-len_control=0",
    ]  # fmt: skip
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)], Watched(family.run, Notebook(folder), trace), custom_mutator=mutated
    )
    atheris.Fuzz()


def _corpus(folder: Path, seeds: list[bytes]) -> Path:
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    return corpus


def _blind(name: str, folder: Path, seconds: float) -> None:
    """Without a guide, what is new is kept and built upon all the same: outcomes tell."""
    family = _family(name)
    from fuzz.mutation import mutate

    seen: set[str] = set()
    inputs, rng = family.seeds, random.Random()
    watched = Watched(family.run, Notebook(folder), seen.add)
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        num_seen = len(seen)
        data = mutate(family, rng.choice(inputs), rng.getrandbits(64))[:MAX_INPUT_BYTES]
        watched(data)
        if len(seen) > num_seen:
            inputs.append(data)
    print(f"#{watched.num_runs} DONE cov: 0 ft: {len(seen)}", file=sys.stderr)
    print(f"stat::number_of_executed_units: {watched.num_runs}", file=sys.stderr)


def main(arguments: list[str]) -> None:
    """See the module docstring."""
    name, folder, seconds, *inputs = arguments
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if inputs:
        family = _family(name)
        for path in inputs:
            print(family.run(Path(path).read_bytes()))
    elif find_spec("atheris") is not None:
        _guided(name, Path(folder), float(seconds))
    else:
        _blind(name, Path(folder), float(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
