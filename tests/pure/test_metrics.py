"""What Prometheus reads: the right numbers under the right names, and never more series than a bound."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.header import ImageHeader
from core.job import Job, Result
from core.request import ImagePart, ImageRequest
from core.states import State
from engine.metrics import MOST_SERIES, Metrics, resolution_class

SNAPSHOT: dict[str, Any] = {
    "uptime": 12.5,
    "ready": True,
    "workers": [
        {"worker": "cuda:0", "state": "busy", "incarnation": 2, "utilisation": 0.5, "memory_used": 3 << 30,
         "memory_total": 80 << 30, "temperature": 61, "power": 350.0, "rss": 400 << 20},
        {"worker": "cpu:0", "state": "restarting", "incarnation": 4, "utilisation": None, "memory_used": None},
    ],
    "queue": {"queued": 5, "running": 3, "by_priority": {"0": 1, "2": 4}, "bytes": 1000, "limit_jobs": 10,
              "limit_bytes": 99,
              "by_group": {"style_comic:1 512x512": 2, "style_comic:1 768x512": 1, "upscale:1 512x512 scale=4": 2}},
}  # fmt: skip


def ended(model: str = "lama", state: State = State.SUCCEEDED, side: int = 512, dialect: str = "jobs") -> Job:
    part = ImagePart("image", b"", ImageHeader("png", side, side), 0)
    job = Job("x", ImageRequest(model, (part,), dialect=dialect), created_at=100.0)
    if state is State.SUCCEEDED:
        job.move(State.RUNNING, 102.0, device="cuda:0")
        timings = {"decode": 0.01, "wait": 0.5, "compute": 0.2, "encode": 0.03}
        job.result = Result("x.png", 1, "png", side, side, "cuda:0", 4, timings)
    job.move(state, 103.0)
    return job


def read(metrics: Metrics) -> dict[str, float]:
    """Every sample as name{labels} -> value."""
    page, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    samples = [sample for family in text_string_to_metric_families(page.decode()) for sample in family.samples]
    named = {f"{one.name}{sorted(one.labels.items())}" if one.labels else one.name: one.value for one in samples}
    assert len(named) == len(samples), "a series is told twice"
    return named


def test_an_ended_job_is_counted_and_its_stages_are_timed() -> None:
    metrics = Metrics()
    metrics.job_ended(ended())
    metrics.job_ended(ended(side=1500, state=State.FAILED, dialect="i2ii"))
    told = read(metrics)
    assert told["imagepool_jobs_total[('dialect', 'jobs'), ('model', 'lama'), ('state', 'succeeded')]"] == 1
    assert told["imagepool_jobs_total[('dialect', 'i2ii'), ('model', 'lama'), ('state', 'failed')]"] == 1
    sums = {"wait": 2.5, "decode": 0.01, "compute": 0.2, "encode": 0.03, "total": 3.0}
    for stage, seconds in sums.items():
        labels = "[('model', 'lama'), ('resolution', '512')]"
        assert told[f"imagepool_job_{stage}_seconds_sum{labels}"] == pytest.approx(seconds)
        assert told[f"imagepool_job_{stage}_seconds_count{labels}"] == 1
    assert told["imagepool_job_total_seconds_count[('model', 'lama'), ('resolution', '2048')]"] == 1
    assert told.get("imagepool_job_compute_seconds_count[('model', 'lama'), ('resolution', '2048')]", 0) == 0


def test_what_happens_is_counted() -> None:
    metrics = Metrics(version="1.2.3")
    metrics.batch_dispatched("lama", resolution_class(512 * 512), 4)
    metrics.restart("cuda:0", "hang")
    metrics.refused("overloaded")
    metrics.refused("overloaded")
    metrics.http("POST", "/jobs", 202, 0.02, received=500, sent=60)
    metrics.http("BREW", "/jobs", 405, 0.02)
    metrics.http_in_progress += 1
    metrics.job_created(ended("style_comic"))
    told = read(metrics)
    assert told["imagepool_batch_size_sum[('model', 'lama'), ('resolution', '512')]"] == 4
    assert told["imagepool_restarts_total[('cause', 'hang'), ('device', 'cuda:0')]"] == 1
    assert told["imagepool_refusals_total[('reason', 'overloaded')]"] == 2
    assert told["imagepool_http_requests_total[('method', 'POST'), ('route', '/jobs'), ('status', '202')]"] == 1
    assert told["imagepool_http_requests_total[('method', 'other'), ('route', '/jobs'), ('status', '405')]"] == 1
    assert told["imagepool_http_request_seconds_count[('method', 'POST'), ('route', '/jobs')]"] == 1
    assert told["imagepool_http_received_bytes_total"] == 500 and told["imagepool_http_sent_bytes_total"] == 60
    assert told["imagepool_http_requests_in_progress"] == 1
    assert told["imagen_jobs_created_total[('job_type', 'style-comic')]"] == 1
    assert told["process_resident_memory_bytes"] > 0
    assert any(name.startswith("imagepool_build_info[") and "1.2.3" in name for name in told)


def test_gauges_tell_the_last_snapshot_and_forget_the_one_before() -> None:
    metrics = Metrics()
    assert "imagepool_ready" not in read(metrics)
    metrics.devices(SNAPSHOT)
    told = read(metrics)
    assert told["imagepool_queue_depth[('priority', '0')]"] == 1
    assert told["imagepool_queue_depth[('priority', '2')]"] == 4
    assert told["imagepool_jobs_in_flight"] == 3 and told["imagepool_queue_limit_jobs"] == 10
    assert told["imagepool_device_up[('device', 'cuda:0')]"] == 1
    assert told["imagepool_device_up[('device', 'cpu:0')]"] == 0
    assert told["imagepool_device_utilisation_ratio[('device', 'cuda:0')]"] == 0.5
    assert told["imagepool_device_memory_total_bytes[('device', 'cuda:0')]"] == 80 << 30
    assert told["imagepool_device_incarnation[('device', 'cpu:0')]"] == 4
    assert "imagepool_device_utilisation_ratio[('device', 'cpu:0')]" not in told, "unknown is no number"
    assert told["imagen_queue_depth[('queue_name', 'style-comic-jobs')]"] == 3
    assert told["imagen_queue_depth[('queue_name', 'upscale-jobs')]"] == 2
    metrics.devices(SNAPSHOT | {"workers": [], "queue": {"by_group": {}, "by_priority": {"0": 0}}, "ready": False})
    told = read(metrics)
    assert told["imagepool_ready"] == 0 and not any("cuda:0" in name or "upscale" in name for name in told)


def test_two_servers_in_one_process_do_not_share_numbers() -> None:
    one, other = Metrics(), Metrics()
    one.refused("overloaded")
    assert "imagepool_refusals_total[('reason', 'overloaded')]" not in read(other)


def test_strangers_cannot_grow_the_number_of_series() -> None:
    metrics = Metrics()
    for number in range(MOST_SERIES + 50):
        metrics.http("GET", f"/{number}", 404, 0.001)
    told = read(metrics)
    assert sum("http_requests_total" in name for name in told) <= MOST_SERIES + 1
    assert told["imagepool_http_requests_total[('method', 'other'), ('route', 'other'), ('status', 'other')]"] == 50


@pytest.mark.parametrize(
    ("width", "height", "label"),
    [(1, 1, "512"), (512, 512, "512"), (513, 512, "1024"), (2048, 512, "1024"), (2048, 2048, "2048"),
     (2049, 2048, "larger")],
)
def test_resolutions_have_four_classes(width: int, height: int, label: str) -> None:
    assert resolution_class(width * height) == label


def test_names_keep_prometheus_conventions() -> None:
    metrics = Metrics()
    metrics.devices(SNAPSHOT)
    metrics.job_ended(ended())
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        assert re.fullmatch(r"(imagepool|imagen|process)_[a-z0-9_]+", family.name) and family.documentation
        for sample in family.samples:
            assert family.type != "counter" or sample.name.endswith("_total")
            assert not sample.name.endswith("_created")
