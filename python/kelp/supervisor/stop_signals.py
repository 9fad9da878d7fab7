"""SIGTERM, SIGINT and SIGHUP as one exception in the main thread, which may be put off while it must not come."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequested(BaseException):
    """SIGTERM or SIGINT came; raised in the main thread, wherever it is."""


class StopSignals:
    """Turns the first SIGTERM, SIGINT or SIGHUP into StopRequested; another one only where it is allowed."""

    def __init__(self) -> None:
        self._is_held = False
        self._has_come = False

    def install(self) -> None:
        """Take the signals over."""
        for signal_number in _STOP_SIGNALS:
            signal.signal(signal_number, self._on_signal)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A signal waits until the block has ended: a process that was just started must not be lost.

        The signal mask would do the same, but children inherit it.
        """
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._has_come:
            raise StopRequested

    def allow_another(self) -> None:
        """The next signal is StopRequested once more."""
        self._has_come = False

    def ignore(self) -> None:
        """From now on, only SIGKILL ends the process early."""
        self._is_held = True

    def _on_signal(self, *_: object) -> None:
        if not self._has_come:
            self._has_come = True
            if not self._is_held:
                raise StopRequested
