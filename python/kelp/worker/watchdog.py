"""Notices an engine that does no work although the worker around it still answers, and in the end makes room."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable

from kelp.core.config_resilience import WatchdogConfig
from kelp.executor.base import Executor
from kelp.worker.self_test import SelfTest

_log = logging.getLogger(__name__)
_LOOKS_PER_TIMEOUT = 4
_LONGEST_LOOK_S = 1.0
_SUSPICIOUS_STEPS = 3
_FAILED_TESTS = 3


class Watchdog:
    """Looks at the step that the engine is in, and at those that failed; belongs to one event loop.

    A step that never ends (a device that hangs, a lock held for ever) shows nowhere else: the worker's loop and its
    heartbeat go on, and requests just get no tokens. An engine whose every step fails (a device that has faulted) even
    draws requests, because it is always idle; that it is not just served bad ones, it shows by failing at one of our
    own. Who supervises processes sees one that lives, so what does not recover has to end itself.

    Args:
        rules: When a step is stuck, and when there is no more hope.
        on_change: Called when the engine turns out to be stuck, and again if it goes on after all.

    Attributes:
        is_stuck: What was found last.
        step_s: How long the step had been under way then; infinite if the engine has died or fails at every step.
    """

    def __init__(self, executor: Executor, rules: WatchdogConfig, on_change: Callable[[], Awaitable[None]]) -> None:
        self._executor = executor
        self._self_test = SelfTest(executor)
        self._num_failed_tests = 0
        self._step_timeout_s = rules.step_timeout_s
        self._hopeless_s = rules.step_timeout_s + rules.end_after_s if rules.end_after_s else None
        self._on_change = on_change
        self.is_stuck = False
        self.step_s = 0.0

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(min(_LONGEST_LOOK_S, self._step_timeout_s / _LOOKS_PER_TIMEOUT))
            self.step_s = await self._measured_step_s()
            is_stuck = self.step_s >= self._step_timeout_s
            if is_stuck != self.is_stuck:
                self.is_stuck = is_stuck
                _log.error("the engine %s", self.why_stuck if is_stuck else "goes on")
                await self._on_change()
            elif self._hopeless_s is not None and self.step_s >= self._hopeless_s:
                _log.critical("the engine is beyond hope: this process ends, for a new one to take its place")
                _end_process()

    @property
    def why_stuck(self) -> str:
        """What is wrong, to follow the engine's name or its worker's."""
        if math.isinf(self.step_s):
            return "is stuck: every step fails" if self._num_failed_tests else "is stuck: the engine's thread has died"
        return f"is stuck in a step of {self.step_s:.0f} s"

    async def _measured_step_s(self) -> float:
        load = self._executor.load()
        if load.num_failed_steps < _SUSPICIOUS_STEPS:
            self._num_failed_tests = 0
            return load.step_s
        has_failed = await self._self_test.has_failed(self._step_timeout_s)
        self._num_failed_tests = self._num_failed_tests + 1 if has_failed else 0
        return math.inf if self._num_failed_tests >= _FAILED_TESTS else load.step_s


def _end_process() -> None:
    """At once: an orderly end would wait for the engine."""
    os._exit(1)
