"""A TCP relay in front of a server, which can be made slow, silent, broken or gone, and whole again."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading

HOST = "127.0.0.1"
_CHUNK_BYTES = 2048
_SLOW_PAUSE_S = 0.05
_POLL_S = 0.05


class FaultyRelay:
    """Passes everything on until told otherwise; its port stays the same.

    Attributes:
        num_relayed_bytes: What clients have sent and got.
    """

    def __init__(self, port: int) -> None:
        self._target = (HOST, port)
        self._mode = "pass"
        self._status = 503
        self._listener: socket.socket | None = None
        self._end = threading.Event()
        self._is_down = threading.Event()
        self._threads: list[threading.Thread] = []
        self.num_relayed_bytes = 0
        self.num_connections = 0
        self._listen(0)

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server((HOST, port), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._is_down.clear()
        self._spawn(self._accept, self._listener)

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def go_down(self) -> None:
        """Refuse connections, and drop those there are."""
        self._is_down.set()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def fail(self, status: int) -> None:
        """Answer every request with an HTTP error."""
        self._mode, self._status = "fail", status

    def fall_silent(self) -> None:
        """Accept and never answer; connections there are hear nothing more."""
        self._mode = "silent"

    def slow_down(self) -> None:
        """Pass on some 40 KB a second."""
        self._mode = "slow"

    def recover(self) -> None:
        """Pass everything on again."""
        self._mode = "pass"
        if self._listener is None:
            self._listen(self.port)

    def close(self) -> None:
        self._end.set()
        self.go_down()
        for thread in self._threads:
            thread.join(10)

    def _is_over(self) -> bool:
        return self._end.is_set() or self._is_down.is_set()

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(_POLL_S)
        while not self._is_over():
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self.num_connections += 1
            self._spawn(self._relay, client)

    def _relay(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),
            client,
            socket.create_connection(self._target) as server,
            selectors.DefaultSelector() as waiting,
        ):
            waiting.register(client, selectors.EVENT_READ, server)
            waiting.register(server, selectors.EVENT_READ, client)
            while not self._is_over():
                for key, _ in waiting.select(_POLL_S):
                    source, target = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    if not self._pass_on(source, target, is_request=source is client):
                        return

    def _pass_on(self, source: socket.socket, target: socket.socket, is_request: bool) -> bool:
        """Relay one chunk; False at the end of the connection."""
        while self._mode == "silent":
            if self._end.wait(_POLL_S) or self._is_down.is_set():
                return False
        chunk = source.recv(_CHUNK_BYTES if self._mode == "slow" else 64 * 1024)
        if not chunk:
            return False
        if self._mode == "fail":
            if is_request:
                source.sendall(b"HTTP/1.1 %d Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % self._status)
            return False
        if self._mode == "slow":
            self._end.wait(_SLOW_PAUSE_S)
        self.num_relayed_bytes += len(chunk)
        target.sendall(chunk)
        return True
