"""Listing, quota and deletion: what keeps the store in bounds and clears tenants out of it.

A quota holds for everything below the prefix, of all models and hosts, so that what nobody reads any more (an older
model, another layout) makes room too; a tenant's share of it holds for its objects of all models. Clearing a tenant
removes its objects of all models; clearing everything removes this model's only.
"""

from __future__ import annotations

from collections.abc import Iterable

from kelp.core.clock import Clock
from kelp.core.errors import RetryableTransferError
from kelp.kv.tiers.objects.gate import StoreGate
from kelp.kv.tiers.objects.known import MAX_GROUPS, KnownGroups
from kelp.kv.tiers.objects.messages import Delete, DeleteDone, List, ListDone, Spaces, SpacesDone
from kelp.kv.tiers.objects.names import KeySpace
from kelp.kv.tiers.objects.sweep import Quota, Sweep

_PAGES_PER_REFRESH = 16
_KEYS_PER_DELETE = 1000
_UNSURE_S = 60.0
"""A write that was given up may still appear in the store for this long."""


class Upkeep:
    """See the module docstring.

    Attributes:
        full_tenants: Whose share had no room for one more group when the store was last listed.
    """

    def __init__(self, gate: StoreGate, keys: KeySpace, known: KnownGroups, quota: Quota, clock: Clock) -> None:
        self._gate = gate
        self._keys = keys
        self._known = known
        self._quota = quota
        self._clock = clock
        self.full_tenants: frozenset[bytes] = frozenset()
        self._sweep: Sweep | None = None
        self._unsure: dict[bytes, float] = {}
        self._to_forget: dict[bytes | None, float] = {}

    @property
    def owed(self) -> frozenset[bytes | None]:
        """Arguments of `forget` whose objects may not all be deleted yet."""
        return frozenset(self._to_forget)

    def note_unsure(self, tenants: Iterable[bytes]) -> None:
        """Writes for these tenants were given up; the store may have taken them all the same."""
        until_s = self._clock.monotonic_s() + _UNSURE_S
        self._unsure.update(dict.fromkeys(tenants, until_s))

    def forget(self, tenant: bytes | None) -> int:
        """Delete a tenant's objects (None: all of this model); how many there were.

        Raises:
            RetryableTransferError: The store could not be reached; `refresh` goes on with it.
        """
        self._known.forget(tenant)
        self._to_forget[tenant] = self._clock.monotonic_s()
        num_deleted = self._delete_all(tenant)
        self._known.forget(tenant)
        again_s = self._unsure_until_s(tenant)
        if again_s is None:
            del self._to_forget[tenant]
        else:
            self._to_forget[tenant] = again_s
        return num_deleted

    def _unsure_until_s(self, tenant: bytes | None) -> float | None:
        """When nothing of a tenant that was given up can appear any more; None if that is so already."""
        now_s = self._clock.monotonic_s()
        self._unsure = {owner: until_s for owner, until_s in self._unsure.items() if until_s > now_s}
        return max((until_s for owner, until_s in self._unsure.items() if tenant in (None, owner)), default=None)

    def _delete_all(self, tenant: bytes | None) -> int:
        num_deleted = 0
        for prefix in self._prefixes(tenant):
            token = ""
            while True:
                page = self._gate.ask(List(prefix, token))
                assert isinstance(page, ListDone)
                keys = [listed.key for listed in page.objects if self._keys.parse(listed.key) is not None]
                num_deleted += self._delete(keys)
                token = page.token
                if not token:
                    break
        return num_deleted

    def _prefixes(self, tenant: bytes | None) -> list[str]:
        if tenant is None:
            return [self._keys.own_prefix]
        spaces = self._gate.ask(Spaces(self._keys.root))
        assert isinstance(spaces, SpacesDone)
        return [self._keys.tenant_prefix(space, tenant) for space in spaces.prefixes]

    def _delete(self, keys: list[str]) -> int:
        """Delete objects; gives how many.

        Raises:
            RetryableTransferError: The store did not delete all of them.
        """
        num_deleted = 0
        for start in range(0, len(keys), _KEYS_PER_DELETE):
            done = self._gate.ask(Delete(tuple(keys[start : start + _KEYS_PER_DELETE])))
            assert isinstance(done, DeleteDone)
            num_deleted += done.num_deleted
            self._gate.counters.num_deleted += done.num_deleted
            if done.failure:
                raise RetryableTransferError(done.failure)
        return num_deleted

    def refresh(self) -> None:
        """List a bounded number of objects; at the end of a listing, learn from it and keep the quota.

        Raises:
            RetryableTransferError: The store could not be reached; the next call begins anew.
        """
        now_s = self._clock.monotonic_s()
        for tenant in [tenant for tenant, due_s in self._to_forget.items() if due_s <= now_s]:
            self.forget(tenant)
        for _ in range(_PAGES_PER_REFRESH):
            if self._list_page():
                break

    def _list_page(self) -> bool:
        """List one page; whether it was the last."""
        if self._sweep is None:
            self._sweep = Sweep(self._quota)
            self._known.start_listing()
        sweep = self._sweep
        try:
            page = self._gate.ask(List(self._keys.root, sweep.token))
        except RetryableTransferError:
            self._sweep = None
            raise
        assert isinstance(page, ListDone)
        for listed in page.objects:
            name = self._keys.parse(listed.key)
            if name is None:
                continue
            sweep.add(listed, name.tenant)
            if name.is_usable and len(sweep.usable) < MAX_GROUPS:
                sweep.usable[name.last] = name.tenant
        sweep.token = page.token
        if not page.token:
            self._sweep = None
            self._finish(sweep)
        return not page.token

    def _finish(self, sweep: Sweep) -> None:
        """The listing is complete."""
        counters = self._gate.counters
        counters.num_listed, counters.listed_bytes = sweep.num_objects, sweep.num_bytes
        for last, tenant in sweep.usable.items():
            if last not in self._known:
                self._known.add(tenant, last)
        self._known.keep(sweep.usable)
        self.full_tenants = sweep.full_tenants()
        surplus = sweep.surplus()
        for key in surplus:
            name = self._keys.parse(key)
            if name is not None and name.is_usable:
                self._known.discard(name.last)
        counters.num_surplus += self._delete(surplus)
