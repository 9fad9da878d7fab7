"""What is done at once for the clients of a router whose process has died: Triton never ends their streams."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from kelp.core.schema import LLM
from kelp.supervisor.connections import break_client_connections

Say = Callable[[str], None]


def free_streams(name: str, server: psutil.Process, say: Say) -> bool:
    """For `ModelWatch`: break the clients' connections if the model that has died is the router; always False.

    With several routers in a server the clients of the others lose theirs, too: which is whose cannot be told.
    """
    if name != LLM.name:
        return False
    try:
        count = break_client_connections(server)
    except (OSError, psutil.Error) as error:
        say(f"{name} died, and its streams may wait for ever: {error}")
    else:
        if count:
            say(f"{name} died, and its streams would wait for ever: {count} connections of clients broken")
    return False
