"""The processes behind a tritonserver's Python models, as this host's process table shows them.

Triton (2.51) does not say that one of them has died, and answers for it for ever; the table does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import psutil

from kelp.core.errors import ConfigError

_SERVER = "tritonserver"
_STUB = "triton_python_backend_stub"
_DEFAULT_GRPC_PORT = "8001"
_GRPC_PORT = "--grpc-port"
_INSTANCE_ARGUMENT = -2
"""Where a stub's command line names the model instance: before the last one."""


def find_server(grpc_port: int) -> psutil.Process | None:
    """The running tritonserver that was told to listen at a gRPC port.

    Raises:
        ConfigError: There are several, of other network namespaces perhaps.
    """
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        arguments = process.info["cmdline"] or []
        is_server = any(argument.rpartition("/")[2] == _SERVER for argument in arguments[:1])
        if is_server and process.info["status"] != psutil.STATUS_ZOMBIE and _grpc_port(arguments) == str(grpc_port):
            found.append(process)
    if len(found) > 1:
        pids = ", ".join(str(process.pid) for process in found)
        raise ConfigError(f"--grpc-port: {grpc_port} is that of several tritonservers here (pids {pids})")
    return found[0] if found else None


def live_stubs(server: psutil.Process) -> dict[str, psutil.Process]:
    """Processes of a server's model instances by the instances' names (`decode_0_0`); empty for a dead server.

    Of several with one name it is the latest.
    """
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in sorted(server.children(), key=psutil.Process.create_time):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                arguments = process.cmdline()
                if len(arguments) > -_INSTANCE_ARGUMENT and arguments[0].endswith(_STUB) and is_live(process):
                    found[arguments[_INSTANCE_ARGUMENT]] = process
    return found


def is_live(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended, and that its parent has not noticed, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_unburied(process: psutil.Process) -> bool:
    """Whether a process has ended and its parent has not noticed."""
    try:
        return process.is_running() and process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _grpc_port(arguments: Sequence[str]) -> str:
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name == _GRPC_PORT:
            return value if separator else "".join(arguments[index + 1 : index + 2])
    return _DEFAULT_GRPC_PORT
