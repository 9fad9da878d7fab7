"""The manager's side of the object-store process: starts it, asks it, kills it when it is late, starts it again.

A thread of its own starts the process, because the kernel ends it with the thread that started it, and waits for its
end. Nobody else waits for a start: until the process is ready, and while it restarts, requests are refused at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kelp.core.errors import KelpError, RetryableTransferError
from kelp.kv.tiers.objects.channel import Channel
from kelp.kv.tiers.objects.messages import AnyAnswer, AnyRequest, Hello, Ready, Refused, decode_answer, encode

_log = logging.getLogger(__name__)

_MODULE = "kelp.kv.tiers.objects.child"
_ENVIRONMENT = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "2"}
"""The AWS SDK in NIXL would try ten times, for 25 s, with nobody able to stop it."""
_START_TIMEOUT_S = 60.0
_DEATH_TIMEOUT_S = 1.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 10.0


class StoreTimeout(RetryableTransferError):
    """The store did not answer in time."""


@dataclass(eq=False)
class _Child:
    """One incarnation.

    Attributes:
        busy_slots: Arena slots that the request in progress may write into.
        is_useful: It has answered a request.
    """

    process: subprocess.Popen[bytes]
    channel: Channel
    is_ready: bool = False
    is_useful: bool = False
    busy_slots: frozenset[int] = frozenset()
    is_dead: threading.Event = field(default_factory=threading.Event)


class StoreProcess:
    """See the module docstring. `ask` is for one caller at a time; the rest is thread-safe.

    Attributes:
        num_starts: Processes started.
    """

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._readiness = threading.Event()
        self._child: _Child | None = None
        self._lost: list[_Child] = []
        self.num_starts = 0
        self._thread = threading.Thread(target=self._keep_running, name="kelp-object-store", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether a request would be made now."""
        return self._readiness.is_set()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        child = self._child
        return child.process.pid if child is not None else None

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until requests are possible."""
        return self._readiness.wait(timeout_s)

    def quarantined(self) -> frozenset[int]:
        """Arena slots that a killed process could still write into, because it is not known to be dead."""
        with self._lock:
            self._lost = [child for child in self._lost if not child.is_dead.is_set()]
            return frozenset().union(*(child.busy_slots for child in self._lost))

    def ask(self, request: AnyRequest, timeout_s: float, busy_slots: Iterable[int] = ()) -> AnyAnswer:
        """Make a request.

        On any failure but a refusal the process is killed, and known to be dead when this raises, or its `busy_slots`
        are `quarantined`.

        Raises:
            StoreTimeout: No answer came in time.
            RetryableTransferError: The process is not ready or died, or the store refused.
        """
        child = self._child
        if child is None or not child.is_ready:
            raise RetryableTransferError("object store: its process is starting")
        child.busy_slots = frozenset(busy_slots)
        try:
            child.channel.send(encode(request), timeout_s)
            answer = decode_answer(child.channel.receive(timeout_s))
        except TimeoutError as error:
            self._kill(child)
            raise StoreTimeout(f"object store: no answer in {timeout_s:g} s") from error
        except (OSError, KelpError) as error:
            self._kill(child)
            raise RetryableTransferError(f"object store: its process died: {error}") from error
        child.busy_slots = frozenset()
        child.is_useful = True
        if isinstance(answer, Refused):
            raise RetryableTransferError(answer.reason)
        return answer

    def close(self) -> None:
        """Kill the process, whatever it does; idempotent. Objects that it was writing appear whole or not at all."""
        with self._lock:
            self._closing.set()
            child = self._child
        self._readiness.clear()
        if child is not None:
            child.process.kill()
        self._thread.join(_DEATH_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("object store: process %s does not die", child and child.process.pid)

    def _kill(self, child: _Child) -> None:
        self._readiness.clear()
        child.is_ready = False
        child.process.kill()
        if not child.is_dead.wait(_DEATH_TIMEOUT_S):
            with self._lock:
                self._lost.append(child)
            _log.error("object store: process %d does not die; its arena slots are set aside", child.process.pid)

    def _keep_running(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._closing.is_set():
            try:
                child = self._start()
            except OSError as error:
                _log.error("object store: its process does not start: %s", error)
                child = None
            if child is not None:
                self._greet(child)
                self._bury(child)
                if child.is_useful:
                    backoff_s = _FIRST_BACKOFF_S
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def _start(self) -> _Child | None:
        with self._lock, contextlib.ExitStack() as stack:
            if self._closing.is_set():
                return None
            ours, theirs = socket.socketpair()
            stack.callback(theirs.close)
            on_failure = stack.enter_context(contextlib.ExitStack())
            on_failure.callback(ours.close)
            process = subprocess.Popen(
                [_interpreter(), "-m", _MODULE, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                cwd="/",
                start_new_session=True,
            )
            on_failure.pop_all()
            self.num_starts += 1
            self._child = _Child(process, Channel(ours))
            return self._child

    def _greet(self, child: _Child) -> None:
        """Tell the process what it works on and wait until it is ready; kill it if it never will be."""
        try:
            child.channel.send(encode(self._hello), _START_TIMEOUT_S)
            answer = decode_answer(child.channel.receive(_START_TIMEOUT_S))
        except (OSError, KelpError) as error:
            answer = Refused(str(error))
        if isinstance(answer, Ready):
            child.is_ready = True
            self._readiness.set()
            return
        if not self._closing.is_set():
            _log.warning("object store: its process does not start: %s", getattr(answer, "reason", answer))
        child.process.kill()

    def _bury(self, child: _Child) -> None:
        """Wait for the end of a process, and leave nothing of it."""
        code = child.process.wait()
        with self._lock:
            self._readiness.clear()
            child.is_ready = False
            self._child = None
        child.is_dead.set()
        child.channel.close()
        if not self._closing.is_set():
            _log.info("object store: process %d ended with %d", child.process.pid, code)


def _interpreter() -> str:
    """A Python of this environment; where Python is embedded, as in Triton's stub, `sys.executable` may be none."""
    candidates: list[Any] = [sys.executable, Path(sys.prefix, "bin", "python3"), shutil.which("python3")]
    for candidate in candidates:
        if candidate and Path(candidate).name.startswith("python") and Path(candidate).is_file():
            return str(candidate)
    raise FileNotFoundError("no Python interpreter next to this one")
