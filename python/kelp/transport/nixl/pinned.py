"""Page-locked host memory, so that a GPU copies to and from it at full speed; nothing where there is no GPU.

Not tested on a GPU yet: the code path is exercised with a stand-in for torch only.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_DRIVER = Path("/dev/nvidiactl")
_FOR_ALL_CONTEXTS = 1


def pin_host_memory(address: int, num_bytes: int) -> bool:
    """Lock mapped memory for the GPUs of this machine; False where there are none or they refuse.

    Importing torch and initialising CUDA takes seconds; without NVIDIA's driver it is not tried.
    """
    runtime = _cuda_runtime()
    if runtime is None:
        return False
    status = int(runtime.cudaHostRegister(address, num_bytes, _FOR_ALL_CONTEXTS))
    if status:
        _log.warning("nixl: %d bytes of host memory could not be pinned: CUDA error %d", num_bytes, status)
    return status == 0


def unpin_host_memory(address: int) -> None:
    """Undo `pin_host_memory`; before the memory is unmapped."""
    runtime = _cuda_runtime()
    if runtime is not None:
        runtime.cudaHostUnregister(address)


def _cuda_runtime() -> Any:
    if not _DRIVER.exists():
        return None
    import torch

    return torch.cuda.cudart() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
