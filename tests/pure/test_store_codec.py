"""Jobs survive the way into a row and back whole; what cannot be kept is refused before anything is written."""

import dataclasses
import math

import pytest
from hypothesis import given, settings

from core.errors import InternalError
from core.job import Job, Result
from core.request import ImagePart, Span
from core.states import State
from store import codec
from tests.pure.store_kit import a_job, any_job, finish


@given(any_job)
@settings(max_examples=200, deadline=None)
def test_any_job_comes_back_from_its_row_equal(job):
    assert codec.decode(codec.encode(job)) == job


@given(any_job)
@settings(max_examples=50, deadline=None)
def test_every_field_of_a_job_has_a_place_in_its_row(job):
    columns = set(codec.encode(job)) | set(codec.LIFE)
    assert {field.name for field in dataclasses.fields(Job)} - {"history"} <= columns


def test_bytes_and_spans_of_a_request_are_refused():
    for data in (b"\x89PNG", memoryview(b"x"), Span(0, 1, 4096)):
        job = a_job()
        part = dataclasses.replace(job.request.images[0], data=data)
        job.request = dataclasses.replace(job.request, images=(part,))
        with pytest.raises(InternalError, match="named files"):
            codec.encode(job)


def test_a_span_of_a_result_is_refused():
    job = finish(a_job())
    job.result = dataclasses.replace(job.result, data=Span(0, 1, 4096))
    with pytest.raises(InternalError):
        codec.encode_life(job)


@pytest.mark.parametrize("strange", [object(), {1, 2}, b"x", 1j, Result])
def test_foreign_objects_in_parameters_are_refused(strange):
    with pytest.raises(InternalError):
        codec.encode(a_job(params={"x": strange}))


def test_a_parameter_that_holds_itself_is_refused_and_not_followed_for_ever():
    loop: dict = {}
    loop["again"] = loop
    with pytest.raises(InternalError):
        codec.encode(a_job(params=loop))


def test_huge_numbers_surrogates_and_nan_in_parameters_survive():
    job = codec.decode(codec.encode(a_job(params={"seed": 2**70, "half": "\ud800", "nul": "\0", "nan": math.nan})))
    assert job.request.params["seed"] == 2**70
    assert job.request.params["half"] == "\ud800"
    assert job.request.params["nul"] == "\0"
    assert math.isnan(job.request.params["nan"])


def test_bytes_are_those_of_the_inputs_and_after_the_end_of_the_result():
    job = a_job()
    assert codec.encode(job)["bytes"] == 1_000
    assert codec.encode_life(finish(job))["bytes"] == 500
    assert codec.encode_life(finish(a_job(), State.FAILED))["bytes"] == 0


def test_a_row_of_an_older_server_without_a_newer_field_reads_with_its_default():
    row = codec.encode(a_job())
    row["request"] = row["request"].replace(',"client":{}', "")
    assert codec.decode(row).request.client == {}


def test_the_parts_of_a_request_keep_their_order():
    job = a_job()
    parts = tuple(ImagePart(role, f"inputs/{job.id}/{n}-{role}.png", job.request.images[0].header, n)
                  for n, role in enumerate(["image", "mask", "image"]))
    job.request = dataclasses.replace(job.request, images=parts)
    assert codec.decode(codec.encode(job)).request.images == parts
