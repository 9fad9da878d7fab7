"""Draws session trees: which request follows which, how long each is, and when it arrives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NO_PARENT = -1
"""Parent of a session's first request."""
_TOKEN_S = 0.02
_FIRST_TOKEN_S = 1.0
_SIGMA = 0.6
_BURST_SESSIONS = 20
_BURST_S = 1.0
_AGENT_SYSTEM_FACTOR = 4
_TOOL_SHARE = 0.1
_FORK_SHARE = 0.25
_MAX_TURNS = 40
_CHUNK_SESSIONS = 256


@dataclass(frozen=True, slots=True)
class SessionLoad:
    """What users do; lengths are medians of lognormal distributions unless they say otherwise.

    Attributes:
        chat_share: Sessions that are multi-turn chats; with the other shares, weights that need not add up to 1.
        agent_share: Sessions that are agent loops with tool calls and parallel children.
        document_share: Sessions that ask several questions about one document.
        num_system_prompts: Shared by chats and agents, by Zipf's law.
        zipf_exponent: Of system prompts and documents.
        system_tokens: Length of system prompts; agents' are four times as long.
        num_documents: From which sessions choose.
        document_tokens: Length of a document.
        user_tokens: New tokens of a user's turn or a tool's result.
        output_tokens: OSL.
        num_turns: Mean turns of a chat, steps of an agent, questions about a document (geometric).
        fan_out: Parallel children that an agent's step has, if it has any (one step in four).
        think_s: Mean time between an answer and the next turn; tools take a tenth.
        burst_share: Sessions that come in bursts of 20 within a second, all with one system prompt.
        diurnal_swing: 0..1: the rate swings by this share around its mean, once per `diurnal_period_s`.
        diurnal_period_s: Length of a simulated day.
    """

    chat_share: float = 0.6
    agent_share: float = 0.2
    document_share: float = 0.2
    num_system_prompts: int = 40
    zipf_exponent: float = 1.1
    system_tokens: int = 1500
    num_documents: int = 400
    document_tokens: int = 8000
    user_tokens: int = 250
    output_tokens: int = 200
    num_turns: float = 5.0
    fan_out: int = 4
    think_s: float = 20.0
    burst_share: float = 0.1
    diurnal_swing: float = 0.3
    diurnal_period_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Trees:
    """Requests by arrival; a parent precedes its children.

    Attributes:
        arrival_s: `[num_requests] float64`.
        parent: `[num_requests] int64`: whose answer this request continues; -1 for a session's first.
        root_text: `[num_requests] int64`: number of the text that the session begins with.
        root_tokens: `[num_requests] int64`: its length.
        prompt_tokens: `[num_requests] int64`.
        output_tokens: `[num_requests] int64`.
        session: `[num_requests] int64`.
    """

    arrival_s: Floats
    parent: Ints
    root_text: Ints
    root_tokens: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    session: Ints


@dataclass(frozen=True, slots=True)
class _Root:
    start_s: float
    kind: int
    text: int
    num_tokens: int


_CHAT, _AGENT, _DOCUMENT = range(3)


class _Grower:
    """Columns of the requests drawn so far, in the order of sessions."""

    def __init__(self, load: SessionLoad, rate: float, generator: np.random.Generator) -> None:
        self._load = load
        self._rng = generator
        shares = np.array([load.chat_share, load.agent_share, load.document_share])
        self._shares = shares / shares.sum()
        self._system = _Texts(load.num_system_prompts, load.system_tokens, load.zipf_exponent, generator)
        self._documents = _Texts(load.num_documents, load.document_tokens, load.zipf_exponent, generator)
        self._session_rate = rate / self._requests_per_session()
        self._base_s = 0.0
        self.last_start_s = 0.0
        self.num_requests = 0
        self._chunks: list[Floats] = []
        self._rows: list[tuple[float, int, int, int, int, int, int]] = []
        self._num_sessions = 0

    def _requests_per_session(self) -> float:
        per_agent_step = 1 + _FORK_SHARE * self._load.fan_out
        return float(self._load.num_turns * (1 + self._shares[_AGENT] * (per_agent_step - 1)))

    def draw_sessions(self) -> None:
        """Start some more sessions, alone or in bursts."""
        load = self._load
        share = load.burst_share / _BURST_SESSIONS
        is_burst = self._rng.random(_CHUNK_SESSIONS) < share / (share + 1 - load.burst_share)
        per_event = 1 + is_burst.mean() * (_BURST_SESSIONS - 1)
        gaps = self._rng.exponential(per_event / self._session_rate, _CHUNK_SESSIONS)
        kinds = self._rng.choice(len(self._shares), _CHUNK_SESSIONS, p=self._shares)
        events = zip((self._base_s + np.cumsum(gaps)).tolist(), kinds.tolist(), is_burst.tolist(), strict=True)
        for start_s, kind, burst in events:
            text = self._texts(kind).draw(self._rng)
            for offset_s in self._rng.random(_BURST_SESSIONS if burst else 1) * _BURST_S * burst:
                self._draw_session(self._root(self._by_day(start_s) + offset_s, kind, text))
        self._base_s += float(gaps.sum())
        self.last_start_s = self._by_day(self._base_s)
        self._chunks.append(np.array(self._rows))
        self._rows.clear()

    def columns(self) -> tuple[Floats, ...]:
        """Of all requests so far, in the order of sessions: the fields of `Trees`."""
        self._chunks = [np.concatenate(self._chunks)]
        return tuple(self._chunks[0].T)

    def _by_day(self, even_s: float) -> float:
        """When a session starts that would start at `even_s` if all hours of the day were equal."""
        day_s, swing = self._load.diurnal_period_s, self._load.diurnal_swing
        return even_s + swing * day_s / (2 * np.pi) * float(np.cos(2 * np.pi * even_s / day_s) - 1)

    def _texts(self, kind: int) -> _Texts:
        return self._documents if kind == _DOCUMENT else self._system

    def _root(self, start_s: float, kind: int, text: int) -> _Root:
        factor = _AGENT_SYSTEM_FACTOR if kind == _AGENT else 1
        return _Root(start_s, kind, 3 * text + kind, int(self._texts(kind).tokens[text]) * factor)

    def _lengths(self, median: int, count: int) -> Ints:
        drawn: Ints = np.maximum(1, self._rng.lognormal(np.log(median), _SIGMA, count)).astype(np.int64)
        return drawn

    def _draw_session(self, root: _Root) -> None:
        load = self._load
        num_turns = min(int(self._rng.geometric(1 / load.num_turns)), _MAX_TURNS)
        new, output = self._lengths(load.user_tokens, num_turns), self._lengths(load.output_tokens, num_turns)
        think_s = load.think_s * (_TOOL_SHARE if root.kind == _AGENT else 1.0)
        pauses = self._rng.exponential(think_s, num_turns).tolist()
        forks = (self._rng.random(num_turns) < _FORK_SHARE).tolist()
        at_s, parent, prompt = root.start_s, NO_PARENT, root.num_tokens
        for turn, (new_tokens, output_tokens) in enumerate(zip(new.tolist(), output.tolist(), strict=True)):
            prompt += new_tokens
            parent = self._add(root, at_s, parent, prompt, output_tokens)
            prompt += output_tokens
            at_s += _FIRST_TOKEN_S + output_tokens * _TOKEN_S + pauses[turn]
            if root.kind == _AGENT and forks[turn]:
                at_s += self._draw_children(root, at_s, parent, prompt)
        self._num_sessions += 1

    def _draw_children(self, root: _Root, at_s: float, parent: int, prompt: int) -> float:
        """Parallel sub-tasks that start together; returns how long the slowest takes."""
        fan_out, load = self._load.fan_out, self._load
        new, output = self._lengths(load.user_tokens, fan_out), self._lengths(load.output_tokens, fan_out)
        for new_tokens, output_tokens in zip(new.tolist(), output.tolist(), strict=True):
            self._add(root, at_s, parent, prompt + new_tokens, output_tokens)
        return _FIRST_TOKEN_S + float(output.max(initial=0)) * _TOKEN_S

    def _add(self, root: _Root, at_s: float, parent: int, prompt: int, output: int) -> int:
        self._rows.append((at_s, parent, root.text, root.num_tokens, prompt, output, self._num_sessions))
        self.num_requests += 1
        return self.num_requests - 1


class _Texts:
    """Texts that sessions share, the first ones the most."""

    def __init__(self, count: int, tokens: int, exponent: float, generator: np.random.Generator) -> None:
        weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
        self._cumulative = np.cumsum(weights / weights.sum())
        self.tokens = np.maximum(1, generator.lognormal(np.log(tokens), _SIGMA, count)).astype(np.int64)

    def draw(self, generator: np.random.Generator) -> int:
        return min(int(np.searchsorted(self._cumulative, generator.random())), len(self.tokens) - 1)


def grow(load: SessionLoad, num_requests: int, rate: float, generator: np.random.Generator) -> Trees:
    """Draw trees and keep the `num_requests` that arrive first, at full density to the end."""
    grower = _Grower(load, rate, generator)
    while grower.num_requests < num_requests:
        grower.draw_sessions()
    # A session that starts later has requests after this only, so nothing that will be kept is missing.
    last_s = np.partition(grower.columns()[0], num_requests - 1)[num_requests - 1]
    while grower.last_start_s < last_s:
        grower.draw_sessions()
    return _by_arrival(grower.columns(), num_requests)


def _by_arrival(columns: tuple[Floats, ...], num_requests: int) -> Trees:
    arrival = columns[0]
    parent, text, root, prompt, output, session = (column.astype(np.int64) for column in columns[1:])
    order = np.argsort(arrival, kind="stable")
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    # Children come after their parents, so whoever is kept has all its ancestors kept.
    kept = order[:num_requests]
    parents = np.where(parent[kept] == NO_PARENT, NO_PARENT, position[parent[kept]])
    first_s = arrival[kept[0]]
    return Trees(arrival[kept] - first_s, parents, text[kept], root[kept], prompt[kept], output[kept], session[kept])
