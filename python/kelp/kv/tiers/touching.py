"""Touching allocated memory before it is needed.

The first write to a page of a mapped file costs many times what writing costs: the kernel clears the page and enters it
into the page table. A thread that gives way to all others does that ahead, so that storing a block need not.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading

from kelp.kv.background import yield_to_others

_log = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23
_STEP_BYTES = 1024 * 1024
"""Nobody can change the address space while a step is under way."""


class Touching:
    """Touches all of some memory, which must stay mapped until `stop` returns; content stays as it is.

    Args:
        address: Of the first byte, at a page.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self._address = address
        self._num_bytes = num_bytes
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kelp-kv-touching", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave the rest to whoever needs it; idempotent."""
        self._is_stopped.set()
        self._thread.join()

    def wait(self) -> None:
        """Until all is touched."""
        self._thread.join()

    def _run(self) -> None:
        yield_to_others()
        madvise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
        for start in range(0, self._num_bytes, _STEP_BYTES):
            if madvise is None or self._is_stopped.is_set():
                return
            size = min(_STEP_BYTES, self._num_bytes - start)
            where = ctypes.c_void_p(self._address + start)
            if madvise(where, ctypes.c_size_t(size), _MADV_POPULATE_WRITE):
                # Kernels before 5.14 do not know it.
                _log.debug("touching: madvise: %s", os.strerror(ctypes.get_errno()))
                return
