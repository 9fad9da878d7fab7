"""NIXL: between processes and hosts (`agent`), to files (`files`) and object stores; the only importer of nixl."""

from kelp.transport.nixl.agent import NixlAgent

__all__ = ["NixlAgent"]
