"""kelp's executor on a CUDA device against transformers and against the bandwidth of the device's memory.

Everybody shares the device and takes turns. Fits an unattended run of ten minutes on a machine without a network: where
`make setup` has left no default model, a random one of the shape of a 1B Llama is written to a temporary folder.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from kelp.core.config import ModelConfig
from perf.executor.bandwidth import floor_tokens_per_s
from perf.executor.contest import Contest
from perf.executor.protocol import Job, Turn
from perf.executor.workloads import Case, tokens_per_s
from perf.gpu.workloads import BANDWIDTH, CASES, KELP, TRANSFORMERS, make_job, references_of, required_rows, rows_of
from perf.reporter import Reporter
from perf.rows import Measurement
from perf.stats import median
from perf.suite import BenchError, Suite

_NUM_ROUNDS = 5
_NUM_ROUNDS_LONG = 15
_WARM_UP_SEED = 1_000_000
"""Of the unmeasured first turn of each case, in which kernels are compiled and graphs captured."""


def _model_folder(stack: ExitStack, reporter: Reporter) -> Path:
    folder = ModelConfig().path
    if (folder / "config.json").is_file():
        return folder
    from perf.gpu.engines import write_random_model

    reporter.say("(no default model here: a random one of the shape of a 1B Llama)")
    made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kelp-bench-")))
    write_random_model(made)
    return made


def _turn(run: Callable[[Job], Turn], vocab_size: int) -> Callable[[Case, int], float]:
    warm: set[str] = set()

    def measure(case: Case, round_number: int) -> float:
        found = []
        if case.name not in warm:
            warm.add(case.name)
            run(make_job(case, vocab_size, _WARM_UP_SEED))
        for repeat in range(case.repeats):
            job = make_job(case, vocab_size, seed=round_number * case.repeats + repeat)
            found.append(tokens_per_s(case, job, run(job)))
        return median(found)

    return measure


def _join_all(stack: ExitStack, contest: Contest, folder: Path) -> None:
    from perf.gpu.engines import KelpOnDevice, TransformersOnDevice, copy_bytes_per_s

    reference = TransformersOnDevice(folder)
    kelp = stack.enter_context(closing(KelpOnDevice(folder)))

    def floor(case: Case, _round_number: int) -> float:
        return floor_tokens_per_s(copy_bytes_per_s(), reference.weights_bytes, case.num_sequences)

    contest.join(KELP, _turn(kelp.run, reference.vocab_size))
    contest.join(TRANSFORMERS, _turn(reference.run, reference.vocab_size))
    contest.join(BANDWIDTH, floor)


def run(reporter: Reporter, is_long: bool) -> None:
    """See `Suite.run`."""
    if not torch.cuda.is_available():
        raise BenchError("no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    reporter.say(f"({properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda})")
    reporter.add(Measurement("device", properties.name, "GB", properties.total_memory / 1e9))
    with ExitStack() as stack:
        contest = Contest()
        _join_all(stack, contest, _model_folder(stack, reporter))
        for case in CASES:
            started_s = time.monotonic()
            num_rounds = _NUM_ROUNDS_LONG if is_long else _NUM_ROUNDS
            for measurement in rows_of(contest.run(case, (KELP, *references_of(case)), num_rounds)):
                reporter.add(measurement)
            reporter.say(f"({case.name}: {num_rounds} rounds in {time.monotonic() - started_s:.0f} s)")


SUITE = Suite(
    name="gpu",
    summary="prefill and decode of the executor on a CUDA device against transformers and memory bandwidth",
    required=tuple(required_rows()),
    run=run,
)
