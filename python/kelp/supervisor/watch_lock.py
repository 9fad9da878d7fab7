"""Only one supervisor acts on a server; another one waits, and takes over when the first has ended, however it did."""

from __future__ import annotations

import fcntl
import os

from kelp.supervisor import run_state


class WatchLock:
    """An advisory lock per gRPC port of this user; the kernel releases it when its process dies.

    Whoever releases it removes the file, so whoever gets a lock looks whether it still is the file's.
    """

    def __init__(self, grpc_port: int) -> None:
        self._path = run_state.user_folder() / f"supervisor-{grpc_port}.lock"
        self._file: int | None = None

    def acquire(self) -> bool:
        """Whether this process has the lock now; never waits."""
        if self._file is not None:
            return True
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_the_file = os.path.samestat(os.fstat(file), self._path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_the_file = False
        if not is_the_file:
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Let go; idempotent."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None
