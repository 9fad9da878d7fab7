"""From host arrays to the device without waiting for it.

A copy out of ordinary memory makes the host wait for everything the device was given before; one out of pinned
memory only queues. Torch's allocator keeps a pinned buffer alive until its copy has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one of this thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stage(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of `array` on `device`; on the CPU a view of it."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def stage_int32(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Several integer arrays in one copy: an int32 tensor of the same shape for each."""
    flat = np.concatenate([np.asarray(array, np.int32).ravel() for array in arrays])
    staged = stage(flat, device)
    ends = np.cumsum([array.size for array in arrays])
    return [staged[end - array.size : end].view(array.shape) for array, end in zip(arrays, ends.tolist(), strict=True)]
