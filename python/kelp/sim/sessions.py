"""Seeded session trees as workloads: chats, agents and document questions that share prefixes the way products do.

A request is a node: its prompt is its parent's prompt, the parent's output and its own new tokens; roots begin with a
shared system prompt or a document. Who arrives when is drawn before the run, as in a trace: a turn comes when its
parent would be answered at a usual pace, plus think or tool time. Identity is chained by construction: a block is
named by its position and by the piece of the tree that its last token lies in, which fixes all tokens before it.

Trees are arrays, requests and hashes are made when asked for, so a million requests take some 50 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from kelp.core.errors import ConfigError
from kelp.core.types import SequenceHash
from kelp.sim.requests import SimRequest, Workload
from kelp.sim.session_trees import NO_PARENT, SessionLoad, Trees, grow

__all__ = ["SessionLoad", "SessionRequests", "make_sessions"]


def make_sessions(
    num_requests: int, rate: float, seed: int, load: SessionLoad | None = None, block_size: int = 64
) -> Workload:
    """Draw a workload of exactly `num_requests` requests; equal arguments give equal workloads.

    Args:
        num_requests: Of all sessions together.
        rate: Sessions start as often as `rate` requests/s need; the first minutes are calmer, while sessions build up.
        seed: Of everything.
        load: What users do.
        block_size: Tokens per block.

    Raises:
        ConfigError: A figure is out of range.
    """
    load = load or SessionLoad()
    for name, value in (("--requests", num_requests), ("--rate", rate), ("--block-size", block_size)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value}: must be positive")
    if not 0 <= load.diurnal_swing < 1:
        raise ConfigError(f"diurnal_swing {load.diurnal_swing}: must be in [0, 1)")
    trees = grow(load, num_requests, rate, np.random.default_rng(seed))
    return Workload("sessions", block_size, SessionRequests(trees, block_size, seed))


class SessionRequests(Sequence[SimRequest]):
    """Requests of session trees by arrival, made when asked for."""

    def __init__(self, trees: Trees, block_size: int, seed: int) -> None:
        self._trees = trees
        self._block_size = block_size
        self._seed = seed

    def __len__(self) -> int:
        return len(self._trees.arrival_s)

    @overload
    def __getitem__(self, index: int) -> SimRequest: ...

    @overload
    def __getitem__(self, index: slice) -> list[SimRequest]: ...

    def __getitem__(self, index: int | slice) -> SimRequest | list[SimRequest]:
        positions = range(len(self))[index]
        return self._at(positions) if isinstance(positions, int) else [self._at(position) for position in positions]

    def _at(self, node: int) -> SimRequest:
        trees = self._trees
        return SimRequest(
            float(trees.arrival_s[node]),
            int(trees.prompt_tokens[node]),
            int(trees.output_tokens[node]),
            self._hashes(node),
            f"s{trees.session[node]}",
        )

    def _hashes(self, node: int) -> tuple[SequenceHash, ...]:
        """Names of the full blocks of a node's prompt."""
        ends, pieces = self._pieces(node)
        num_blocks = int(ends[-1]) // self._block_size
        last_tokens = np.arange(1, num_blocks + 1) * self._block_size - 1
        owners = pieces[np.searchsorted(ends, last_tokens, side="right")]
        return tuple(map(self._name, owners.tolist(), range(num_blocks)))

    def _pieces(self, node: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each piece of a prompt ends, and its number: root texts are odd negative, prompts even, outputs odd."""
        trees = self._trees
        ends = [int(trees.prompt_tokens[node])]
        pieces = [2 * node]
        parent = int(trees.parent[node])
        while parent != NO_PARENT:
            end = int(trees.prompt_tokens[parent])
            ends += [end + int(trees.output_tokens[parent]), end]
            pieces += [2 * parent + 1, 2 * parent]
            node, parent = parent, int(trees.parent[parent])
        ends.append(int(trees.root_tokens[node]))
        pieces.append(-2 * int(trees.root_text[node]) - 1)
        return np.array(ends[::-1]), np.array(pieces[::-1])

    def _name(self, piece: int, position: int) -> SequenceHash:
        raw = b"%d %d %d" % (self._seed, piece, position)
        return SequenceHash(hashlib.blake2b(raw, digest_size=16, person=b"kelp-sessions").digest())
