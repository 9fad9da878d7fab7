"""What all kelp models share: configuration, an event loop, metrics, and one guard around every request."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from kelp.core.config import KelpConfig, load_config
from kelp.core.errors import WorkerLost
from kelp.core.exchange import as_kelp_error
from kelp.core.huge_pages import collapse_heap
from kelp.core.metrics import MODEL_RESTARTS, Metrics
from kelp.core.schema_types import RESTART_PARAMETER
from kelp_triton.exchange import Exchange
from kelp_triton.loop import LoopThread
from kelp_triton.metrics import MetricsExporter

_log = logging.getLogger(__name__)
_GC_THRESHOLDS = (20_000, 20, 20)
"""Requests leave hardly any cycles: with Python's own 700 a collection, for nothing, comes with every second one."""
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 15.0


class KelpModel:
    """Base of the models; Triton calls `initialize`, `execute` and `finalize` from its own thread.

    `execute` answers through response senders and returns at once: a model that returns its responses serves one
    request at a time, and an exception in an `async def execute` hangs the client.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model; an error's message becomes Triton's load error."""
        logging.basicConfig(stream=sys.stderr, format=f"%(levelname).1s kelp {args['model_name']}: %(message)s")
        document = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in document.get("parameters", {}).items()}
        num_restarts = parameters.pop(RESTART_PARAMETER, "0")
        self.model_name = args["model_name"]
        self.instance_name = args.get("model_instance_name", self.model_name)
        self.config: KelpConfig = load_config(parameters)
        self.metrics = Metrics()
        if num_restarts.isdecimal():
            self.metrics.set(MODEL_RESTARTS, float(num_restarts), model=self.model_name)
        self._loop = LoopThread(f"kelp-{self.model_name}")
        try:
            self._server = self._loop.wait(_leave_with_server(), _START_TIMEOUT_S)
            self._loop.wait(self.start(), _START_TIMEOUT_S)
        except BaseException:
            self._loop.close()
            raise
        self._exporter = MetricsExporter(self.metrics)
        # What has been loaded stays: collections need not look at it again, which takes longer than most requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        collapse_heap()

    def execute(self, requests: list[Any]) -> None:
        """Hand every request to the loop."""
        self._loop.launch([self._guarded(Exchange(request)) for request in requests])

    def finalize(self) -> None:
        """Let go of everything."""
        try:
            self._loop.wait(self.stop(), _STOP_TIMEOUT_S)
        except TimeoutError:
            _log.error("did not stop within %.0f s", _STOP_TIMEOUT_S)
        self._loop.close()
        os.close(self._server)
        self._exporter.close()

    async def start(self) -> None:
        """Build the model, on the loop."""
        raise NotImplementedError

    async def handle(self, exchange: Exchange) -> None:
        """Serve one request to its end, or raise."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Take the model down, on the loop."""

    async def _guarded(self, exchange: Exchange) -> None:
        try:
            await self.handle(exchange)
        except asyncio.CancelledError:
            exchange.fail(WorkerLost(f"model {self.model_name} is stopping"))
        except Exception as error:
            exchange.fail(as_kelp_error(error))
        finally:
            exchange.finish()


async def _leave_with_server() -> int:
    """End this process at the moment in which its tritonserver dies; returns the descriptor that tells of it.

    The stub notices by itself only later, and leaves through the C library's exit: that takes torch's tables apart
    under steps that still run, whose failures, or worse, would reach routers over the sockets of our own.
    """
    server = os.pidfd_open(os.getppid())
    asyncio.get_running_loop().add_reader(server, os._exit, 1)
    return server
