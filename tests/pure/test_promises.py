"""Room for results of accepted jobs: learned, never below what is open, exact when all have ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.request import OutputFormat
from engine.promises import Promises
from tests.pure.store_kit import a_job


def test_a_kind_that_is_unknown_is_promised_an_image_that_cannot_be_compressed() -> None:
    promises = Promises()
    promises.add(job := a_job(), 1000)
    promises.add(job, 1000)
    assert promises.bytes == 3000
    promises.add(a_job(output=OutputFormat("jpeg")), 1000)
    assert promises.bytes == 4000


def test_the_first_result_corrects_what_all_others_of_its_kind_are_promised() -> None:
    promises = Promises()
    jobs = [a_job() for _ in range(5)]
    for job in jobs:
        promises.add(job, 1000)
    promises.settle(jobs[0].id, 500)
    assert promises.bytes == 4 * 500
    promises.settle(jobs[1].id, 2000)
    assert promises.bytes == 3 * 2000, "a larger one counts at once"
    promises.settle(jobs[2].id, 1000)
    assert promises.bytes == 2 * 1900, "a smaller one little by little"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10_000), st.none() | st.integers(0, 50_000))))
def test_when_all_have_ended_nothing_is_promised(steps: list[tuple[int, int, int | None]]) -> None:
    promises, jobs = Promises(), [a_job() for _ in range(6)]
    for which, pixels, size in steps:
        promises.add(jobs[which], pixels)
        assert promises.bytes >= -1e-3
        if size is not None:
            promises.settle(jobs[which].id, size)
            promises.settle(jobs[which].id, size)
    for job in jobs:
        promises.settle(job.id)
    assert promises.bytes == 0
