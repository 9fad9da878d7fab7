"""Moving bytes between registered memory of different processes, and between memory and files."""

from __future__ import annotations

import logging
from typing import Literal

from kelp.core.errors import ConfigError
from kelp.transport.base import Agent, FileTransport

_log = logging.getLogger(__name__)


def open_agent(kind: Literal["nixl", "local"], name: str) -> Agent:
    """Make the agent that a configuration names; may take a second and touches the accelerator.

    Raises:
        ConfigError: The transport's wheel is missing or its backend does not start.
    """
    if kind == "local":
        from kelp.transport.local import LocalAgent

        return LocalAgent(name)
    from kelp.transport.nixl import NixlAgent

    return NixlAgent(name)


def open_file_transport(is_direct: bool) -> FileTransport:
    """What moves slots between memory and files.

    Args:
        is_direct: The files are open with O_DIRECT: NIXL reaches the disk's limit there. What goes through the page
            cache is faster by plain calls, and so it is done where NIXL has no backend that starts.
    """
    from kelp.transport.files import PlainFiles

    if not is_direct:
        return PlainFiles()
    from kelp.transport.nixl.files import NixlFiles

    try:
        return NixlFiles()
    except ConfigError as error:
        _log.warning("files: plain calls instead of NIXL: %s", error.text)
        return PlainFiles()
