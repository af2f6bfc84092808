"""Which ended jobs retention names, and that it never names one that has not ended."""

from hypothesis import given
from hypothesis import strategies as st

from store.retention import expired

DAY = 86_400.0


def test_a_job_goes_when_it_ended_longer_ago_than_max_age():
    jobs = [("new", 9 * DAY, 1), ("old", 1 * DAY, 1), ("exactly", 3 * DAY, 1)]
    assert expired(jobs, now=10 * DAY, max_age=7 * DAY, max_bytes=None) == ["old"]


def test_the_oldest_ends_go_first_until_the_bytes_fit():
    jobs = [("c", 3.0, 40), ("a", 1.0, 40), ("b", 2.0, 40)]
    assert expired(jobs, now=4.0, max_age=None, max_bytes=100) == ["a"]
    assert expired(jobs, now=4.0, max_age=None, max_bytes=79) == ["a", "b"]
    assert expired(jobs, now=4.0, max_age=None, max_bytes=120) == []


def test_unfinished_jobs_count_with_their_bytes_but_stay():
    jobs = [("running", None, 1_000), ("a", 1.0, 1), ("b", 2.0, 1)]
    assert expired(jobs, now=3.0, max_age=None, max_bytes=10) == ["a", "b"]
    assert expired([("running", None, 1_000)], now=1e12, max_age=0.0, max_bytes=0) == []


def test_no_limits_keep_everything():
    assert expired([("a", 0.0, 1 << 60)], now=1e12, max_age=None, max_bytes=None) == []


def test_a_clock_that_went_back_deletes_nothing():
    assert expired([("a", 5_000.0, 1)], now=1_000.0, max_age=60.0, max_bytes=None) == []


@given(
    st.lists(st.tuples(st.uuids().map(str), st.none() | st.floats(0, 1e9), st.integers(0, 1_000)), max_size=20),
    st.floats(0, 1e9), st.none() | st.floats(0, 1e9), st.none() | st.integers(0, 5_000),
)
def test_what_is_named_is_ended_oldest_first_and_no_more_than_needed(jobs, now, max_age, max_bytes):
    doomed = expired(jobs, now, max_age, max_bytes)
    ends = {job_id: at for job_id, at, _ in jobs}
    sizes = {job_id: size for job_id, _, size in jobs}
    assert all(ends[job_id] is not None for job_id in doomed)
    assert [ends[job_id] for job_id in doomed] == sorted(ends[job_id] for job_id in doomed)
    left = {job_id for job_id in ends if job_id not in doomed}
    ended_left = [job_id for job_id in left if ends[job_id] is not None]
    if max_age is not None:
        assert all(now - ends[job_id] <= max_age for job_id in ended_left)
    if max_bytes is not None and ended_left:
        assert sum(sizes[job_id] for job_id in left) <= max_bytes
    if doomed:  # the last one named was needed
        last = doomed[-1]
        assert (max_age is not None and now - ends[last] > max_age) or (
            max_bytes is not None and sum(sizes[job_id] for job_id in left) + sizes[last] > max_bytes)
