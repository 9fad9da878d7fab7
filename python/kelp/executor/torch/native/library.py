"""Compiles `kernels.c` for this processor, once per machine, and opens the result.

Compiled on the spot, because only then may the compiler use all that the processor has. The library lies in the cache
folder under a name made of everything that it depends on, so a new version or another processor gets its own. Without a
compiler there is no library, and torch's own operators do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from kelp.core.config import default_cache_folder

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    # What vectorising sums and exponentials takes; NaN and infinity keep their meaning.
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-shared",
    "-fPIC",
)
_COMPILE_TIMEOUT_S = 60.0


@functools.cache
def open_library() -> ctypes.CDLL | None:
    """The compiled kernels, compiled now if they are not there; None, and one log line, where that is impossible."""
    if platform.machine() != "x86_64":
        _log.info("CPU kernels: none for %s; torch's operators do the work", platform.machine())
        return None
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        _log.warning(
            "CPU kernels: no C compiler (cc) found, decoding will be slower; install one, e.g. apt-get install gcc"
        )
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, default_cache_folder() / "native")))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("CPU kernels: cannot be compiled or opened, decoding will be slower: %s", _reason(error))
        return None


def _compiled(compiler: str, folder: Path) -> Path:
    """Path of the library; compiled by several processes at once, one of equal results wins."""
    path = folder / f"kernels-{_key(compiler)}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        os.replace(made, path)
    _log.info("CPU kernels: compiled into %s", path)
    return path


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
    digest = hashlib.blake2b(digest_size=12)
    for part in (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version.stdout, _processor().encode()):
        digest.update(hashlib.blake2b(part).digest())
    return digest.hexdigest()


def _processor() -> str:
    """What `-march=native` depends on."""
    wanted = ("vendor_id", "cpu family", "model\t", "flags")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(wanted))


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    stderr = getattr(error, "stderr", None)
    lines = stderr.decode(errors="replace").splitlines() if stderr else []
    return next((line for line in lines if "error" in line), str(error))
