"""Slots of the host tier that a failed call of a lower tier may still touch: out of use until it provably has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kelp.kv.manager.threads import TierThread

LetGo = Callable[[int], None]


class Quarantine:
    """Of one lower tier; belongs to one event loop.

    Args:
        thread: The tier's.
        stuck: Asks the tier for slots that are still being touched; called in its thread.
    """

    def __init__(self, thread: TierThread, stuck: Callable[[], frozenset[int]]) -> None:
        self._thread = thread
        self._stuck = stuck
        self._waiting: list[tuple[int, LetGo]] = []

    def __len__(self) -> int:
        """Slots that are out of use."""
        return len(self._waiting)

    async def end(self, slots: Sequence[int], let_go: LetGo) -> None:
        """A call that has failed is over: let go of its slots, as soon as each may be."""
        if slots:
            self._waiting += [(slot, let_go) for slot in slots]
            await self.sweep()

    async def sweep(self) -> None:
        """Let go of what is no longer touched."""
        if not self._waiting:
            return
        stuck = await self._thread.run(self._stuck)
        waiting, self._waiting = self._waiting, []
        for slot, let_go in waiting:
            if slot in stuck:
                self._waiting.append((slot, let_go))
            else:
                let_go(slot)
