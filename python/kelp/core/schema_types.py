"""How a tensor of a Triton model is described, without knowing any particular model.

One description serves the rendered config.pbtxt, the request parser and the graph tests, so that a tensor's
name and type are written down once. Nothing here imports Triton.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

RESTART_PARAMETER = "epoch"
"""A parameter that is no configuration: Triton loads a model again only if something in its configuration differs."""


class Datatype(str, enum.Enum):
    """Triton's names of element types, as its protocol writes them."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    BYTES = "BYTES"

    @property
    def config_name(self) -> str:
        """The name in config.pbtxt, where BYTES is called STRING."""
        return "TYPE_STRING" if self is Datatype.BYTES else f"TYPE_{self.value}"

    @property
    def numpy(self) -> np.dtype[Any]:
        """Element type of the arrays that Triton hands to a Python model; `object` (of `bytes`) for BYTES."""
        return np.dtype(_NUMPY[self])


_NUMPY: dict[Datatype, type] = {
    Datatype.BOOL: np.bool_,
    Datatype.UINT8: np.uint8,
    Datatype.UINT32: np.uint32,
    Datatype.UINT64: np.uint64,
    Datatype.INT32: np.int32,
    Datatype.INT64: np.int64,
    Datatype.FP16: np.float16,
    Datatype.FP32: np.float32,
    Datatype.BYTES: np.object_,
}


class InputUse(str, enum.Enum):
    """What `llm` does with an input.

    `USED` is acted upon. `ALIAS` is another name of a used input. `NEUTRAL_ONLY` is declared because clients of
    other backends send it, and refused unless its value changes nothing. `NO_EFFECT` may have any value.
    """

    USED = "used"
    ALIAS = "alias"
    NEUTRAL_ONLY = "neutral-only"
    NO_EFFECT = "no-effect"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one model.

    Attributes:
        dims: As in config.pbtxt, without a batch dimension; -1 is any length.
        optional: Inputs only; outputs may always be left out of a response.
        neutral: For `NEUTRAL_ONLY`: elements that ask for nothing. An empty tensor is always neutral.
        alias_of: For `ALIAS`: the input that this one renames.
    """

    name: str
    datatype: Datatype
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    use: InputUse = InputUse.USED
    neutral: tuple[bool | int | float | str, ...] = ()
    alias_of: str = ""

    @property
    def is_scalar(self) -> bool:
        """Whether the tensor holds exactly one element."""
        return self.dims == (1,)


@dataclass(frozen=True, slots=True)
class ModelSchema:
    """Everything config.pbtxt says about one model.

    Attributes:
        is_decoupled: Whether a request may have any number of responses.
        parameters: Dotted configuration keys (`core.config`) fixed for this model.
    """

    name: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    is_decoupled: bool
    parameters: tuple[tuple[str, str], ...] = ()
