"""A real `kelp serve` on a host of its own (`support.net_hosts`), known to the others through etcd."""

from __future__ import annotations

import json
import subprocess
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from kelp.core.config import load_config
from kelp.registry.access import RegistryAccess, open_registry
from kelp.registry.base import WorkerRecord
from support.debian import find_library
from support.llm_client import http_post
from support.net_hosts import NetHost
from support.serving import KelpServer

_POST = """
import sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
sys.stdout.write(urllib.request.urlopen(request, timeout=60).read().decode())
"""


def _faketime() -> Path | None:
    return find_library("*/faketime/libfaketimeMT.so.1")


def why_no_skew() -> str | None:
    """What this machine lacks for clocks that go wrong, or None."""
    return None if _faketime() else "there is no faketime (scripts/setup.sh test, or apt-get install faketime)"


def skewed(ahead_s: int) -> tuple[str, ...]:
    """Begins the command line of a process whose clocks are ahead of all others by this."""
    return ("env", f"LD_PRELOAD={_faketime()}", f"FAKETIME={ahead_s:+d}s")


def forget_skew() -> None:
    """Remove what faketime leaves in /dev/shm of processes that were killed."""
    for path in Path("/dev/shm").glob("*faketime_*"):
        pid = path.name.rpartition("_")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)


class HostServer(KelpServer):
    """See the module docstring.

    Args:
        mode: `aggregated` or `disaggregated`.
        prefix: Begins its command line, within the host.
        arguments: Further options of `kelp serve`.
    """

    def __init__(
        self,
        host: NetHost,
        settings: dict[str, object],
        *,
        mode: str = "aggregated",
        prefix: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
    ) -> None:
        own = {"events.host": host.address, "replicas.host": host.address}
        super().__init__(mode, settings={**settings, **own}, arguments=("--host", host.address, *arguments))
        self.host = host
        self._arguments = [*host.prefix, *prefix, *self._arguments]
        self._registry: RegistryAccess | None = None

    @property
    def grpc_endpoint(self) -> str:
        return f"{self.host.address}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{self.host.address}:{self.http_port}"

    def all_records(self) -> list[WorkerRecord]:
        """Registered workers of all hosts, as this one could read them."""
        if self._registry is None:
            self._registry = open_registry(load_config(path=self.run_folder / "kelp.yaml").registry, self.peer_token)
        return self._registry.workers.snapshot()

    def records(self) -> dict[str, WorkerRecord]:
        """Its own registered workers by model name."""
        own = [record for record in self.all_records() if record.endpoint == self.grpc_endpoint]
        return {record.model_name: record for record in own}

    def explain(self, request_id: str) -> dict[str, Any]:
        """The decision about a request, whichever router made it; empty if this one does not come to know it."""
        status, body = self._generate(text_input="", kelp_explain=request_id)
        explanation: dict[str, Any] = json.loads(json.loads(body)["text_output"]) if status == 200 else {}
        return explanation

    def generate(self, **fields: Any) -> dict[str, Any]:
        """One request over HTTP."""
        status, body = self._generate(**fields)
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def answers(self, **fields: Any) -> bool:
        """Whether it serves a request."""
        try:
            return self._generate(**fields)[0] == 200
        except (OSError, HTTPException):
            return False

    def ask_from_inside(self, **fields: Any) -> dict[str, Any]:
        """One request by a client on the host itself, which needs no link."""
        url = f"{self.http_url}/v2/models/llm/generate"
        command = [*self.host.prefix, sys.executable, "-c", _POST, url, json.dumps(fields)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def _generate(self, **fields: Any) -> tuple[int, bytes]:
        return http_post(f"{self.http_url}/v2/models/llm/generate", {"max_tokens": 1, **fields})
