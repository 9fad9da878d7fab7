"""A real etcd of one member for tests: started on free ports, killed, brought back, with or without its memory."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from support.debian import find_program
from support.serving import free_ports
from support.waiting import wait_until

_START_S = 60.0
_READY = "serving client traffic"
_IN_MEMORY = Path("/dev/shm")


def why_no_etcd() -> str | None:
    """What this machine lacks for an etcd, or None."""
    return None if find_program("etcd") else "there is no etcd (scripts/setup.sh test, or apt-get install etcd-server)"


class EtcdServer:
    """One etcd; its data is in memory, so that a slow disk does not decide a test.

    Args:
        host: Address at which it listens.
        prefix: Begins its command line, to run it elsewhere.
        arguments: Further options of etcd.
    """

    def __init__(self, host: str = "127.0.0.1", prefix: tuple[str, ...] = (), arguments: tuple[str, ...] = ()) -> None:
        self._host = host
        self.port, self._peer_port = free_ports(2)
        self._prefix = prefix
        self._arguments = arguments
        self._folder = Path(tempfile.mkdtemp(prefix="kelp-etcd-", dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None))
        self._process: subprocess.Popen[bytes] | None = None
        self._scheme = "https" if any(part.startswith("--cert-file") for part in arguments) else "http"

    @property
    def endpoint(self) -> str:
        return f"{self._host}:{self.port}"

    @property
    def log(self) -> str:
        path = self._folder / "log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def __enter__(self) -> EtcdServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start it, with the memory that it has; wait until it serves clients."""
        client, peer = f"{self._scheme}://{self.endpoint}", f"http://{self._host}:{self._peer_port}"
        log = self._folder / "log"
        num_starts = self.log.count(_READY)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *self._prefix,
                    *(
                        find_program("etcd") or "etcd",
                        "--name",
                        "m",
                        "--data-dir",
                        str(self._folder / "data"),
                        "--logger",
                        "zap",
                    ),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    *("--initial-cluster", f"m={peer}", *self._arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = self._process
        try:
            wait_until(lambda: process.poll() is not None or self.log.count(_READY) > num_starts, "ready", _START_S)
            assert process.poll() is None
        except AssertionError as error:
            raise AssertionError(f"etcd: {error}: {self.log}") from None

    def freeze(self) -> None:
        """It accepts connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; what it has stored stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Remove what it has stored; only while it is down."""
        assert self._process is None
        shutil.rmtree(self._folder / "data")

    def close(self) -> None:
        """Stop it and leave nothing behind."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
