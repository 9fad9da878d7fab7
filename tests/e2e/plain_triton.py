"""Triton as a user starts it by hand: the design's command, no `kelp serve`, no configuration."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from support.llm_client import http_get
from support.serving import HOST, clean_environment, free_ports, new_log
from support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
WRAPPER = Path(sys.executable).with_name("tritonserver")
_START_S = 240.0
_STOP_S = 40.0


class PlainTriton:
    """`tritonserver --model-repository=… --backend-directory=…` through the wrapper of `make setup`."""

    def __init__(self) -> None:
        self.http_port, self.grpc_port, metrics_port = free_ports(3)
        self._log = new_log("plain-triton-")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    str(WRAPPER),
                    *("--model-repository=model_repository", "--backend-directory=backends"),
                    *("--model-control-mode=explicit", "--load-model=*", "--strict-readiness=false"),
                    *(f"--http-port={self.http_port}", f"--http-address={HOST}"),
                    *(f"--grpc-port={self.grpc_port}", f"--grpc-address={HOST}"),
                    *(f"--metrics-port={metrics_port}", f"--metrics-address={HOST}"),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(),
            )

    @property
    def grpc_endpoint(self) -> str:
        return f"{HOST}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{HOST}:{self.http_port}"

    def __enter__(self) -> PlainTriton:
        try:
            wait_until(lambda: self._process.poll() is not None or self._is_ready(), "llm ready", _START_S)
            assert self._process.poll() is None, self.log()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            assert self._process.wait(_STOP_S) == 0, self.log()
        finally:
            self._kill()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _is_ready(self) -> bool:
        models = ("llm", "preprocess", "prefill", "decode")
        return all(http_get(f"{self.http_url}/v2/models/{model}/ready")[0] == 200 for model in models)

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.unlink(missing_ok=True)
