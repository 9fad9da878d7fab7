from __future__ import annotations

import pytest
from perf.kv import evict
from perf.kv.evict import CASES, DEFAULT, REQUIRED, RIVALS, TOTAL, Saved, measure, ratio_of_sums, rows_of
from perf.rows import judge
from perf.stats import Pair

from kelp.core.config_kv import KvManagerConfig
from kelp.kv.eviction.catalogue import POLICY_NAMES
from kelp.sim.eviction import make_stream
from kelp.sim.sessions import make_sessions


def saved_of(own: float, other: float) -> Saved:
    return Saved({DEFAULT: [own] * 3} | {rival: [other] * 3 for rival in RIVALS})


def test_the_default_policy_is_what_the_block_manager_ships_with() -> None:
    assert KvManagerConfig().eviction == DEFAULT


def test_every_rival_and_the_bound_are_required_of_every_case_and_of_their_sum() -> None:
    names = {(row.case, row.metric) for row in REQUIRED}
    assert {case.name for case in CASES} >= {"evict_conversation_2.5pct", "evict_sessions_40pct_single"}
    for case in (*(case.name for case in CASES), TOTAL):
        for rival in ("lru", "lfu", "s3-fifo", "clairvoyant"):
            assert (case, f"saved/{rival}") in names


@pytest.mark.parametrize(("own", "is_ok"), [(0.2, True), (0.199, False), (0.21, True)])
def test_a_case_is_right_if_the_default_saves_at_least_what_lru_does(own: float, is_ok: bool) -> None:
    row = next(row for row in rows_of("evict_conversation_5pct", saved_of(own, 0.2)) if row.metric == "saved/lru")
    verdict = judge(row, needs_reference=True)
    assert (verdict.is_measured, verdict.is_ok) == (True, is_ok)


def test_in_sum_the_default_has_to_save_more() -> None:
    rows = {row.metric: row for row in rows_of(TOTAL, saved_of(0.2, 0.2))}
    assert not judge(rows["saved/lru"], needs_reference=True).is_ok
    assert judge(rows["saved/clairvoyant"], needs_reference=True).is_ok


def test_the_ratio_is_of_sums_and_its_interval_of_parts() -> None:
    ratio = ratio_of_sums([Pair(3.0, 1.0), Pair(1.0, 1.0), Pair(0.0, 0.0)])
    assert ratio is not None
    assert ratio.value == 2.0
    assert ratio.low == 1.0 and ratio.high == 3.0
    assert ratio_of_sums([Pair(1.0, 0.0)]) is None


def test_parts_of_runs_add_up_to_the_share_of_all() -> None:
    streams = [make_stream(make_sessions(60, 8.0, seed, block_size=128)) for seed in (1, 2)]
    saved = measure(streams, 0.3, num_parts=3)
    assert all(len(saved.by_policy[name]) == 6 for name in (*POLICY_NAMES, "clairvoyant"))
    assert 0 < saved.total("lru") <= saved.total("clairvoyant") < 1


def test_absent_traces_are_explained_and_the_sum_is_missing_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}

    class Told:
        def explain(self, case: str, trouble: str) -> None:
            told[case] = trouble

    monkeypatch.setattr(evict, "trouble_of", lambda workload: f"{workload} is not there")
    evict.run(Told(), is_long=False)  # type: ignore[arg-type]
    assert set(told) == {row.case for row in REQUIRED}
