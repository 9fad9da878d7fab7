"""Control of a running tritonserver: readiness and the model-repository API."""

from __future__ import annotations

import json
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from kelp.core.errors import ConfigError, NotFound, WorkerLost

_VERSION_FILE = "file:1/.gitkeep"
_CALL_TIMEOUT_S = 5.0
_LOAD_TIMEOUT_S = 300.0


class TritonControl:
    """Synchronous; for the CLI and the supervisor.

    Every method raises WorkerLost when the server cannot be reached.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._client = triton.InferenceServerClient(endpoint)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def is_live(self) -> bool:
        """Whether the server answers at all."""
        try:
            return bool(self._client.is_server_live(client_timeout=_CALL_TIMEOUT_S))
        except InferenceServerException:
            return False

    def is_model_ready(self, name: str) -> bool:
        """Whether a model answers; False also while the server is not up."""
        try:
            return bool(self._client.is_model_ready(name, client_timeout=_CALL_TIMEOUT_S))
        except InferenceServerException:
            return False

    def states(self) -> dict[str, str]:
        """State of every model the repository knows: READY, or UNAVAILABLE with its reason."""
        index = self._call(self._client.get_model_repository_index, as_json=True)
        return {
            model["name"]: " ".join(filter(None, (model.get("state", ""), model.get("reason", ""))))
            for model in index.get("models", [])
        }

    def ready_models(self) -> set[str]:
        """Models that the server answers for, those included whose configuration came with the load."""
        answer = self._call(self._client.get_inference_statistics, as_json=True)
        return {model["name"] for model in answer.get("model_stats", [])}

    def config_of(self, name: str) -> dict[str, Any]:
        """A loaded model's configuration.

        Raises:
            NotFound: It is not loaded.
        """
        try:
            answer = self._call(self._client.get_model_config, name, as_json=True)
        except ConfigError as error:
            raise NotFound(f"model {name} is not loaded on {self._endpoint}: {error.text}") from None
        return dict(answer["config"])

    def load(self, name: str, config: dict[str, Any] | None = None) -> None:
        """Load a model; with `config`, one that is not on disk, or a reload with new parameters.

        The configuration comes with one file, which Triton demands of a model that it does not find on disk, so
        that the repository may be read-only.

        Raises:
            ConfigError: The model did not load; carries its own error.
        """
        arguments: dict[str, Any] = {}
        if config is not None:
            arguments = {"config": json.dumps(config), "files": {_VERSION_FILE: b""}}
        self._call(self._client.load_model, name, timeout=_LOAD_TIMEOUT_S, **arguments)

    def unload(self, name: str) -> None:
        """Ask for a model to be unloaded; running requests finish first."""
        self._call(self._client.unload_model, name)

    def _call(self, method: Any, *arguments: Any, timeout: float = _CALL_TIMEOUT_S, **named: Any) -> Any:
        try:
            return method(*arguments, client_timeout=timeout, **named)
        except InferenceServerException as error:
            status = str(error.status())
            if "UNAVAILABLE" in status or "DEADLINE" in status:
                raise WorkerLost(f"tritonserver at {self._endpoint}: {error.message()}") from None
            raise ConfigError(str(error.message())) from None
