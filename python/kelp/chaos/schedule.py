"""When which fault comes: drawn from a seed, so that what has failed once can be played again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kelp.chaos.faults import OF_STORE, PHASES, Fault, FaultKind, Phase
from kelp.core.errors import ConfigError

_LEAST_GAP = 0.5
"""Of the longest time between two faults."""
_SHORT_S = (2.0, 6.0)
_LASTS_S = {
    FaultKind.WORKER_PAUSED: (0.2, 0.8),
    FaultKind.WORKER_STUCK: (6.0, 12.0),
    FaultKind.REGISTRY_GONE: _SHORT_S,
    FaultKind.MEMORY_FULL: _SHORT_S,
    FaultKind.DISK_FULL: _SHORT_S,
    FaultKind.DISK_SLOW: _SHORT_S,
    **dict.fromkeys(OF_STORE, _SHORT_S),
}
_LONG_REGISTRY_S = (60.0, 60.0)
_LONG_RUN_S = 600.0
"""Runs from here on lose the registry for a minute, every other time."""
_SPARE = (FaultKind.WORKER_PAUSED, FaultKind.DEADLINE_PASSED, FaultKind.BAD_INPUT)
_PREFILL_PHASES = (Phase.PREFILLING, Phase.TRANSFERRING)


@dataclass(frozen=True, slots=True)
class ScheduleSpec:
    """What a schedule is drawn from.

    Attributes:
        rate_per_s: At least one fault comes every 1 / `rate_per_s` seconds.
        kinds: Played in turns, each turn in another order, so that all of them come.
        prefill_workers: Names of the models.
        decode_workers: The same; without prefill workers, those that do both.
    """

    seed: int
    duration_s: float
    rate_per_s: float
    kinds: tuple[FaultKind, ...]
    prefill_workers: tuple[str, ...]
    decode_workers: tuple[str, ...]


def make_schedule(spec: ScheduleSpec) -> tuple[Fault, ...]:
    """Faults in the order of their times; equal specifications give equal schedules.

    Raises:
        ConfigError: A field makes no sense.
    """
    if spec.rate_per_s <= 0:
        raise ConfigError(f"rate {spec.rate_per_s}: must be above 0")
    if not spec.kinds:
        raise ConfigError("kinds: at least one kind of fault is needed")
    rng = random.Random(spec.seed)
    faults: list[Fault] = []
    drawn = _turns(rng, spec.kinds)
    at_s = rng.uniform(_LEAST_GAP, 1.0) / spec.rate_per_s
    while at_s < spec.duration_s:
        kind, phase = next(drawn)
        faults.append(Fault(round(at_s, 3), kind, _target(rng, spec, kind, phase), phase, _lasts_s(rng, spec, kind)))
        at_s += rng.uniform(_LEAST_GAP, 1.0) / spec.rate_per_s
    return tuple(faults)


def spare_faults(spec: ScheduleSpec) -> Iterator[Fault]:
    """Without end: faults that are soon over and hardly ever lack a victim, for times when those of the schedule do."""
    rng = random.Random(f"{spec.seed} spare")
    kinds = [kind for kind in _SPARE if kind in spec.kinds]
    for kind in itertools.cycle(rng.sample(kinds, len(kinds))):
        yield Fault(0.0, kind, _target(rng, spec, kind, None), None, _lasts_s(rng, spec, kind))


def _turns(rng: random.Random, kinds: Sequence[FaultKind]) -> Iterator[tuple[FaultKind, Phase | None]]:
    phases: dict[FaultKind, Iterator[Phase]] = {}
    while True:
        turn = list(kinds)
        rng.shuffle(turn)
        for kind in turn:
            if kind not in PHASES:
                yield kind, None
                continue
            phase = next(phases.get(kind, iter(())), None)
            if phase is None:
                phases[kind] = iter(rng.sample(PHASES[kind], len(PHASES[kind])))
                phase = next(phases[kind])
            yield kind, phase


def _target(rng: random.Random, spec: ScheduleSpec, kind: FaultKind, phase: Phase | None) -> str:
    workers = (*spec.prefill_workers, *spec.decode_workers)
    if kind is FaultKind.WORKER_KILLED and phase in _PREFILL_PHASES and spec.prefill_workers:
        workers = spec.prefill_workers
    elif kind is FaultKind.WORKER_KILLED and phase is Phase.DECODING:
        workers = spec.decode_workers
    elif kind not in _CONCERN_WORKERS:
        return ""
    return rng.choice(workers)


_CONCERN_WORKERS = frozenset(
    {
        FaultKind.WORKER_KILLED,
        FaultKind.WORKER_PAUSED,
        FaultKind.WORKER_STUCK,
        FaultKind.WORKER_RELOADED,
        FaultKind.SERVER_KILLED,
        FaultKind.SERVER_TERMINATED,
    }
)


def _lasts_s(rng: random.Random, spec: ScheduleSpec, kind: FaultKind) -> float:
    bounds = _LASTS_S.get(kind)
    if kind is FaultKind.REGISTRY_GONE and spec.duration_s >= _LONG_RUN_S and rng.random() < 0.5:
        bounds = _LONG_REGISTRY_S
    return 0.0 if bounds is None else round(rng.uniform(*bounds), 3)
