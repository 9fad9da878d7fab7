"""Processes of models that were loaded anew: what runs in them ends there, and what they die with ends nowhere.

A process that is done is buried by Triton, which unloads it. One that has died with requests is not: Triton waits for
those for ever, and calls the model ready, as its successor is. So a former process that has ended and that nobody has
buried, in two looks, has died.
"""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from kelp.supervisor.stubs import is_unburied


class Remains:
    """Of one server; belongs to one thread."""

    def __init__(self) -> None:
        self._latest: dict[str, psutil.Process] = {}
        self._former: list[tuple[str, psutil.Process]] = []
        self._suspects: list[tuple[str, psutil.Process]] = []

    @property
    def are_suspect(self) -> bool:
        """Whether another look should come soon."""
        return bool(self._suspects)

    def look(self, stubs: Mapping[str, psutil.Process]) -> frozenset[str]:
        """Models of which a former process has died, until they are forgotten.

        Args:
            stubs: Living processes by the names of their instances.
        """
        self._former += [(name, stub) for name, stub in self._latest.items() if stubs.get(name) != stub]
        self._latest = dict(stubs)
        unburied = [item for item in self._former if is_unburied(item[1])]
        died = [item for item in unburied if item in self._suspects]
        self._suspects = unburied
        return frozenset(_model_of(name) for name, _ in died)

    def forget(self, model: str) -> None:
        """It is known what became of a model's former processes that have ended."""
        self._former = [item for item in self._former if _model_of(item[0]) != model or item not in self._suspects]
        self._suspects = [item for item in self._suspects if _model_of(item[0]) != model]


def _model_of(instance: str) -> str:
    """`llm` of `llm_0_0`: Triton appends the number of a group, and that of an instance in it."""
    return instance.rsplit("_", 2)[0]
