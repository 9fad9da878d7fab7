"""What the object tier counts; plain numbers, read by whoever exports them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class ObjectCounters:
    """Since the start. Only ever added to, by the thread that makes a request; reading needs no lock.

    Attributes:
        num_puts: Groups written; `num_present` were in the store already.
        num_mismatches: Groups not written because the arena no longer held what their records say.
        put_seconds: Of all writing requests; `get_seconds` of all reading ones.
        num_gets: Groups read; `num_blocks` right blocks came of them.
        num_missing: Groups that the store no longer had.
        num_damaged: Blocks that were not what they should be; none of them was served.
        num_asked: Questions whether a group exists.
        num_failures: Requests that the store refused, failed or did not answer in time.
        num_timeouts: Of those, the last kind.
        num_refused: Requests not made because the store is left alone or its process is starting.
        num_starts: Processes started, the first one included.
        num_deleted: Objects deleted; `num_surplus` of them to keep the quota.
        num_listed, listed_bytes: What the last complete listing found, of all hosts and models.
    """

    num_puts: int = 0
    num_present: int = 0
    num_mismatches: int = 0
    put_bytes: int = 0
    put_seconds: float = 0.0
    num_gets: int = 0
    num_blocks: int = 0
    get_bytes: int = 0
    get_seconds: float = 0.0
    num_missing: int = 0
    num_damaged: int = 0
    num_asked: int = 0
    num_failures: int = 0
    num_timeouts: int = 0
    num_refused: int = 0
    num_starts: int = 0
    num_deleted: int = 0
    num_surplus: int = 0
    num_listed: int = 0
    listed_bytes: int = 0

    def events(self) -> dict[str, int]:
        """What has happened, by kind: what only ever grows and is no amount of bytes or time."""
        kinds = {name.removeprefix("num_"): count for name, count in asdict(self).items() if name.startswith("num_")}
        del kinds["listed"]
        return kinds
