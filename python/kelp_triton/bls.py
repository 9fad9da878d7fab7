"""Unary BLS: a short call to another model of the same server."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from kelp.core.errors import from_message
from kelp.core.exchange import Tensors


class BlsClient:
    """Calls one model that answers each request once.

    Streams never pass here: decoupled BLS deadlocks under concurrency.
    """

    def __init__(self, model_name: str, output_names: tuple[str, ...]) -> None:
        self._model_name = model_name
        self._output_names = list(output_names)

    async def call(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Send tensors, get tensors.

        Raises:
            KelpError: The model's typed error; WorkerLost if it is not loaded or its process died.
        """
        return await asyncio.to_thread(self._call, inputs)

    def _call(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        request = pb_utils.InferenceRequest(
            model_name=self._model_name,
            requested_output_names=self._output_names,
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
        )
        try:
            response = request.exec()
        except pb_utils.TritonModelException as error:
            raise from_message(str(error)) from None
        if response.has_error():
            raise from_message(response.error().message())
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
