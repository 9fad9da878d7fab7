"""`kelp traffic`: what share of the requests each version of the model gets, and back again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kelp.core.errors import ConfigError, NotFound
from kelp.core.types import Role, WorkerState
from kelp.registry.access import RegistryAccess
from kelp.registry.base import TrafficRecord, WorkerRecord


@dataclass(frozen=True, slots=True)
class VersionTraffic:
    """One version as it is now.

    Attributes:
        share: Of the requests, 0 to 1; None: no shares are set, each router serves its own version.
        model_ids: Usually one; several mean that different weights go by one name.
        num_ready: Workers that take requests, by role.
        num_workers: All of them.
    """

    version: str
    share: float | None
    model_ids: tuple[str, ...]
    num_ready: Mapping[str, int]
    num_workers: int


class Traffic:
    """Shares of versions in one registry.

    Every method raises ConfigError when the registry cannot be reached.

    Args:
        own_version: What is served as long as nothing is set.
    """

    def __init__(self, registry: RegistryAccess, own_version: str) -> None:
        self._registry = registry
        self._own_version = own_version

    def shares(self) -> dict[str, float]:
        """As they are set; empty if they are not."""
        record = self._record()
        return {} if record is None else dict(record.shares)

    def versions(self) -> list[VersionTraffic]:
        """All that have workers or a share, by name."""
        shares, workers = self.shares(), self._workers()
        total = sum(shares.values())
        names = sorted({*shares, *(record.version for record in workers)})
        return [_version(name, shares.get(name, 0.0) / total if total else None, workers) for name in names]

    def set(self, shares: Mapping[str, float]) -> None:
        """Replace the shares.

        Raises:
            ConfigError: Nobody would get anything.
            NotFound: A version has no worker that decodes.
        """
        shares = {name: share for name, share in shares.items() if share}
        if not shares:
            raise ConfigError("traffic: all shares are 0; one version must get something")
        serving = {
            record.version
            for record in self._workers()
            if record.role is not Role.PREFILL and record.state is WorkerState.READY
        }
        for name in (name for name in shares if name not in serving):
            raise NotFound(f"traffic: version {name!r} has no ready decode worker; there are {_listed(serving)}")
        self._write(TrafficRecord(shares=shares, before=self.shares() or {self._own_version: 1.0}))

    def back(self) -> dict[str, float]:
        """Undo the last change; a second time it is done again.

        Raises:
            ConfigError: There was none.
        """
        record = self._record()
        if record is None:
            raise ConfigError("traffic: no earlier shares to go back to")
        self._write(TrafficRecord(shares=record.before, before=record.shares))
        return dict(record.before)

    def _record(self) -> TrafficRecord | None:
        try:
            return next(iter(self._registry.traffic.snapshot()), None)
        except OSError as error:
            raise ConfigError(f"registry unreachable: {error}") from None

    def _workers(self) -> list[WorkerRecord]:
        try:
            return self._registry.workers.snapshot()
        except OSError as error:
            raise ConfigError(f"registry unreachable: {error}") from None

    def _write(self, record: TrafficRecord) -> None:
        try:
            self._registry.traffic.set(record)
        except OSError as error:
            raise ConfigError(f"registry unreachable: {error}") from None


def _version(name: str, share: float | None, workers: list[WorkerRecord]) -> VersionTraffic:
    own = [record for record in workers if record.version == name]
    ready = Counter(record.role.value for record in own if record.state is WorkerState.READY)
    return VersionTraffic(name, share, tuple(sorted({record.layout.model_id for record in own})), ready, len(own))


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
