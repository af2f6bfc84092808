"""The scheduler's small parts: the agenda, learned costs, admission."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Overloaded, TooLarge
from scheduler.admission import Admission, Rate
from scheduler.agenda import Agenda
from scheduler.config import SchedulerConfig
from scheduler.pace import Arrivals, Curve, learn

# --- agenda -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["add", "raise", "lower", "discard", "first"]), st.integers(0, 5),
                          st.integers(1, 9))))
def test_the_agenda_gives_the_least_key_whatever_keys_did(steps):
    keys = dict.fromkeys(range(6), 0)
    agenda: Agenda[int] = Agenda(keys.__getitem__)
    here: set[int] = set()
    for step, item, by in steps:
        if step == "discard":
            agenda.discard(item)
            here.discard(item)
        elif step != "first":
            keys[item] += {"add": 0, "raise": by, "lower": -by}[step]
            if step != "raise" or item not in here:
                agenda.add(item)
                here.add(item)
        assert agenda.least() == min((keys[item] for item in here), default=None)
        assert set(agenda) == here and len(agenda) == len(here)


def test_the_agenda_takes_equal_keys_in_turn():
    keys = dict.fromkeys("abc", 0)
    agenda: Agenda[str] = Agenda(keys.__getitem__)
    for item in "abc":
        agenda.add(item)
    seen = ""
    for _ in range(9):
        seen += (item := agenda.first())
        keys[item] += 1
    assert seen == "abcabcabc"


def test_the_agenda_forgets_what_was_discarded():
    agenda: Agenda[int] = Agenda(float)
    for item in range(10_000):
        agenda.add(item)
        agenda.discard(item - 1)
    assert len(agenda._heap) < 100 and agenda.first() == 9_999
    assert agenda.due(9_998) is None and agenda.due(9_999) == 9_999


# --- learned costs ----------------------------------------------------------------------------------------------------


def test_a_curve_learns_the_fixed_and_the_variable_part():
    curve = Curve()
    assert curve.seconds(1) is None
    chance = random.Random(1)
    for _ in range(100):
        size = chance.randint(1, 8)
        curve.learn(size, (0.5 + 0.1 * size) * chance.uniform(0.95, 1.05))
    assert curve.seconds(1) == pytest.approx(0.6, rel=0.1) and curve.seconds(8) == pytest.approx(1.3, rel=0.1)


def test_a_curve_of_one_size_says_something_sensible_about_others():
    curve = Curve()
    for _ in range(10):
        curve.learn(4, 1.0)
    assert curve.seconds(4) == pytest.approx(1.0) and 0.5 <= curve.seconds(1) < 1.0 < curve.seconds(8) <= 2.0


def test_two_devices_paces_come_apart_and_their_products_come_true():
    curve, quick, slow = Curve(), None, None
    for size in (1, 2, 8, 4, 3, 6, 7, 5, 2, 8) * 4:
        quick = learn(curve, quick, size, 0.5 + 0.1 * size)
        slow = learn(curve, slow, size, 3 * (0.5 + 0.1 * size))
    assert slow / quick == pytest.approx(3.0, rel=0.05)
    assert curve.seconds(8) * quick == pytest.approx(1.3, rel=0.1)


def test_a_first_batch_that_loaded_the_model_is_soon_forgotten():
    curve = Curve()
    pace = learn(curve, None, 1, 60.0)
    for _ in range(3):
        pace = learn(curve, pace, 1, 0.1)
    assert curve.seconds(1) * pace == pytest.approx(0.1, rel=0.05)


def test_one_slow_batch_does_not_change_the_picture():
    curve, pace = Curve(), None
    for _ in range(50):
        pace = learn(curve, pace, 1, 0.1)
    pace = learn(curve, pace, 1, 60.0)
    assert curve.seconds(1) * pace < 0.2


def test_the_gap_of_arrivals_is_that_within_bursts():
    arrivals, now = Arrivals(), 0.0
    assert arrivals.gap == math.inf
    for _ in range(50):
        for wait in (1.0, 0.01, 0.01, 0.01):
            now += wait
            arrivals.came(now, 1)
    assert 0.01 < arrivals.gap < 0.1


def test_the_echo_counts_from_the_end_of_a_batch_and_the_gap_from_the_last_arrival():
    arrivals = Arrivals()
    arrivals.came(0.0, 1)
    arrivals.answered(1.0)
    assert arrivals.next() == (math.inf, 1.0)
    arrivals.came(5.0, 1)
    assert arrivals.next() == (5.0, 5.0)
    arrivals.answered(6.0)
    assert arrivals.next() == (4.0, 6.0)


def test_the_peak_is_remembered_and_outlived():
    arrivals = Arrivals()
    arrivals.came(0.0, 9)
    assert arrivals.peak == 9
    for n in range(64):
        arrivals.came(float(n), 2)
        arrivals.answered(n + 0.5)
    assert arrivals.peak == 2


def test_shares_of_nothing_and_margins_below_one_are_refused():
    with pytest.raises(ValueError, match="starve"):
        SchedulerConfig(shares=(5, 3, 1, 0))
    with pytest.raises(ValueError, match="at least 1"):
        SchedulerConfig(margin=0.5)


# --- admission --------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_queue_is_bounded_in_jobs_and_in_bytes():
    admission = Admission(3, 1000)
    first = admission.admit(400)
    admission.admit(400)
    with pytest.raises(Overloaded) as refused:
        admission.admit(300)
    assert refused.value.retry_after >= 1 and refused.value.retryable
    last = admission.admit(200)
    with pytest.raises(Overloaded):
        admission.admit(0)
    assert (admission.jobs, admission.bytes) == (3, 1000)
    first.release()
    last.release()
    assert (admission.jobs, admission.bytes) == (1, 400)
    admission.admit(600, jobs=2)
    admission.check()


def test_what_never_fits_is_refused_for_good():
    admission = Admission(3, 1000)
    for size, jobs in ((1001, 1), (0, 4)):
        with pytest.raises(TooLarge) as refused:
            admission.admit(size, jobs=jobs)
        assert not refused.value.retryable


def test_a_grant_is_given_back_once():
    admission = Admission(3, 1000)
    grant = admission.admit(10)
    admission.admit(10)
    grant.release()
    grant.release()
    assert (admission.jobs, admission.bytes) == (1, 10)


def test_a_tenant_holds_no_more_than_its_share_and_others_still_come_in():
    admission = Admission(10, 1000, tenant_share=0.3)
    for _ in range(3):
        admission.admit(10, tenant="greedy")
    with pytest.raises(Overloaded, match="your own jobs"):
        admission.admit(10, tenant="greedy")
    admission.admit(900, tenant="modest")
    with pytest.raises(Overloaded, match="your own jobs"):
        admission.admit(1, tenant="modest")
    admission.check()


def test_jobs_from_before_a_restart_come_in_whatever_is_full():
    admission = Admission(1, 100)
    grants = [admission.force(80) for _ in range(3)]
    assert admission.jobs == 3
    with pytest.raises(Overloaded):
        admission.admit(1)
    for grant in grants:
        grant.release()
    admission.admit(100)


def test_retry_after_follows_the_rate_at_which_jobs_leave():
    clock = Clock()
    admission = Admission(1000, 1 << 30, clock=clock)
    grants = [admission.admit(1) for _ in range(1000)]
    for grant in grants[:300]:
        clock.now += 0.1
        grant.release()
        admission.admit(1)
    with pytest.raises(Overloaded) as refused:
        admission.admit(20, jobs=20)
    assert refused.value.retry_after == 4.0  # of two seconds, with some slack, rounded up
    clock.now += 1000.0
    with pytest.raises(Overloaded) as refused:
        admission.admit(20, jobs=20)
    assert refused.value.retry_after > 2.5, "nothing has left for long"


def test_a_rate_rises_and_fades():
    rate = Rate()
    assert rate.at(0.0) == 0.0
    for n in range(1000):
        rate.add(1.0, n * 0.1)
    assert rate.at(99.9) == pytest.approx(10.0, rel=0.1)
    assert rate.at(200.0) < 0.01


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from("xyz"), st.booleans())))
def test_the_sums_are_right_after_any_admissions_and_releases(steps):
    admission, grants = Admission(5, 1000, tenant_share=0.6), []
    for size, tenant, leave in steps:
        if leave and grants:
            grants.pop(size % len(grants)).release()
        else:
            before = (admission.jobs, admission.bytes)
            try:
                grants.append(admission.admit(size, tenant=tenant))
            except Overloaded:
                assert (admission.jobs, admission.bytes) == before
        admission.check()
        assert admission.jobs == len(grants) <= 5 and admission.bytes == sum(grant.size for grant in grants) <= 1000
