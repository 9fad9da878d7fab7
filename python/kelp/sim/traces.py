"""Mooncake traces as workloads: what came when, how long, and which 512-token prefix blocks it shared.

Format (Qin et al., Mooncake, FAST'25): one JSON object a line with `timestamp` (ms from the start), `input_length`,
`output_length` (tokens) and `hash_ids` (a name per block of 512 tokens; equal means an equal whole prefix up to there;
the last block may be partial). A partial block can't be reused, so it gets no hash.

Reads files; knows nothing of the simulation.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kelp.core.errors import ConfigError
from kelp.core.types import SequenceHash
from kelp.sim.requests import SimRequest, Workload

BLOCK_SIZE = 512
"""Tokens per block in Mooncake's files."""

CONVERSATION_STEP_S = 3.0
"""The conversation trace's timestamps fall on steps of about this length, with up to 28 requests at one instant."""

_MILLISECOND_S = 1e-3
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True, slots=True)
class _Row:
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: Sequence[int]


def read_trace(path: Path, spread_s: float = 0.0, seed: int = 0) -> Workload:
    """Read a trace, gzipped or not.

    Args:
        path: `.jsonl` or `.jsonl.gz`; its name without these is the workload's name.
        spread_s: Each arrival is put off by a random share of this much, at most to the next timestamp of the file:
            for traces whose clock was coarse (`CONVERSATION_STEP_S`). 0 replays as is.
        seed: Of the spreading alone.

    Raises:
        ConfigError: The file cannot be read or is no such trace; names file and line.
    """
    rows = list(_rows(path))
    if not rows:
        raise ConfigError(f"{path}: no requests in it")
    rows.sort(key=lambda row: row.arrival_s)
    arrivals = _spread([row.arrival_s for row in rows], spread_s, random.Random(seed))
    names = _BlockNames(path)
    requests = [
        SimRequest(arrival_s, row.num_prompt_tokens, row.num_output_tokens, names.of(row))
        for arrival_s, row in zip(arrivals, rows, strict=True)
    ]
    requests.sort(key=lambda request: request.arrival_s)
    return Workload(workload_name(path), BLOCK_SIZE, tuple(requests))


def workload_name(path: Path) -> str:
    """The file's name without `.jsonl` and `.gz`."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


class _BlockNames:
    """Digests by id; ids mean something within one file only, so its name is part of the digest."""

    def __init__(self, path: Path) -> None:
        self._prefix = workload_name(path).encode()
        self._names: dict[int, SequenceHash] = {}

    def of(self, row: _Row) -> tuple[SequenceHash, ...]:
        return tuple(self._name(hash_id) for hash_id in row.hash_ids[: row.num_prompt_tokens // BLOCK_SIZE])

    def _name(self, hash_id: int) -> SequenceHash:
        name = self._names.get(hash_id)
        if name is None:
            digest = hashlib.blake2b(self._prefix + hash_id.to_bytes(8, "little"), digest_size=16, person=b"kelp-trace")
            name = self._names[hash_id] = SequenceHash(digest.digest())
        return name


def _rows(path: Path) -> Iterator[_Row]:
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise ConfigError(f"--trace {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(io.StringIO(data.decode("utf-8", "replace")), start=1):
        if line.strip():
            yield _parse(line, f"--trace {path}, line {number}")


def _parse(line: str, where: str) -> _Row:
    try:
        fields: dict[str, Any] = json.loads(line)
        timestamp_ms, num_prompt, num_output, hash_ids = (fields[name] for name in _FIELDS)
        row = _Row(float(timestamp_ms) * _MILLISECOND_S, int(num_prompt), int(num_output), [int(i) for i in hash_ids])
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{where}: must be a JSON object with {', '.join(_FIELDS)}") from None
    if row.arrival_s < 0 or row.num_prompt_tokens < 1 or row.num_output_tokens < 1 or min(row.hash_ids, default=0) < 0:
        raise ConfigError(f"{where}: times and ids must not be negative, lengths must be positive")
    if len(row.hash_ids) < row.num_prompt_tokens // BLOCK_SIZE:
        raise ConfigError(f"{where}: {len(row.hash_ids)} hash_ids are too few for {row.num_prompt_tokens} tokens")
    return row


def _spread(arrivals: Sequence[float], spread_s: float, generator: random.Random) -> list[float]:
    """Put each arrival off by up to `spread_s`, but not past the file's next timestamp."""
    if spread_s <= 0:
        return list(arrivals)
    stamps = sorted(set(arrivals))
    following = dict(zip(stamps, [*stamps[1:], stamps[-1] + spread_s], strict=True))
    return [at_s + generator.random() * min(spread_s, following[at_s] - at_s) for at_s in arrivals]
