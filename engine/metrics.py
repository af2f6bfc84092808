"""What Prometheus sees: counters and histograms fed as things happen, gauges told from the engine's last snapshot.

Every label has few values: models, routes and devices are counted, and beyond a bound they share the value "other".
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.job import Job
from engine.tallies import MOST_SERIES, Counts, Histograms, Series

disable_created_metrics()  # type: ignore[no-untyped-call]  # a *_created twin beside every series would double the page for no reader

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RESOLUTIONS = ((512, "512"), (1024, "1024"), (2048, "2048"))
SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
BATCHES = (1, 2, 4, 8, 16, 32)
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
STAGES = {
    "wait": "from acceptance to the start of its batch",
    "decode": "decoding its images",
    "compute": "in the model, its whole batch",
    "encode": "encoding its result",
    "total": "from acceptance to its end",
}


def resolution_class(pixels: int) -> str:
    """The resolution label: the smallest square (512, 1024, 2048) that holds so many pixels, else "larger"."""
    return next((name for side, name in RESOLUTIONS if pixels <= side * side), "larger")


class _Stages(NamedTuple):
    """The histograms of one model at one resolution."""

    wait: Series
    decode: Series
    compute: Series
    encode: Series
    total: Series


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None, *, version: str = "dev") -> None:
        self.registry = registry or CollectorRegistry()
        self._snapshot = _Snapshot()
        self.registry.register(self._snapshot)
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes, process_cpu_seconds_total, ...
        build = Info("imagepool_build", "Version of the server.", registry=self.registry)
        build.info({"version": version, "python": platform.python_version()})

        self._jobs = self._counter("jobs", "Jobs that ended.", "model", "state", "dialect")
        self._restarts = self._counter("restarts", "Workers that were lost and started again.", "device", "cause")
        self._refusals = self._counter("refusals", "Requests not admitted, by error or budget.", "reason")
        self._http = self._counter("http_requests", "Answers given.", "method", "route", "status")
        self._batches = self._histogram("batch_size", "Images per batch.", BATCHES, "model", "resolution")
        self._http_seconds = self._histogram("http_request_seconds", "Seconds per answer.", SECONDS, "method", "route")
        self._stages = {
            stage: self._histogram(f"job_{stage}_seconds", f"Seconds of a job {what}.", SECONDS, "model", "resolution")
            for stage, what in STAGES.items()
        }
        self._store_seconds = self._histogram(
            "store_seconds", "Seconds until the disk had it: a new job, a result, an end.", SECONDS, "what"
        )
        self._by_job: dict[tuple[str, str], _Stages] = {}
        self._created = Counts(self.registry, "imagen_jobs_created", "Jobs accepted, by imagen's names.", "job_type")
        self.http_in_progress = 0
        in_progress = Gauge("imagepool_http_requests_in_progress", "Requests being answered.", registry=self.registry)
        in_progress.set_function(lambda: self.http_in_progress)
        self._connections = Gauge("imagepool_http_connections", "Open connections.", registry=self.registry)
        self._bytes_in = self._counter("http_received_bytes", "Bytes of bodies received.")
        self._bytes_out = self._counter("http_sent_bytes", "Bytes of bodies sent.")

    def job_created(self, job: Job) -> None:
        """A job was accepted."""
        self._created.add((_job_type(job.request.model),))

    def job_ended(self, job: Job) -> None:
        """A job reached its final state. Stages are counted for those that succeeded. This is on the hot path."""
        request = job.request
        self._jobs.add((request.model, job.state.value, request.dialect))
        if job.ended_at is None:
            return
        image = request.image
        size = resolution_class(image.header.pixels) if image else "512"
        stages = self._by_job.get((request.model, size)) or self._new_stages(request.model, size)
        stages.total.observe(job.ended_at - job.created_at)
        if job.result is not None:
            timings = job.result.timings
            waited = (job.started_at or job.created_at) - job.created_at
            stages.wait.observe(waited + timings.get("wait", 0.0))
            stages.decode.observe(timings.get("decode", 0.0))
            stages.compute.observe(timings.get("compute", 0.0))
            stages.encode.observe(timings.get("encode", 0.0))

    def batch_dispatched(self, model: str, resolution: str, size: int) -> None:
        """A batch of so many images went to a worker. `resolution` as `resolution_class` names it."""
        self._batches[model, resolution].observe(size)

    def restart(self, device: str, cause: str) -> None:
        """A worker was lost. `cause`: a word or two, of a bounded set."""
        self._restarts.add((device, cause[:64]))

    def refused(self, reason: str) -> None:
        """A request was not admitted; `reason` is the error's code, or of which budget it had too much."""
        self._refusals.add((reason,))

    def stored(self, what: str, seconds: float) -> None:
        """The disk has taken something of a durable job; `what`: accept, result or end."""
        self._store_seconds[(what,)].observe(seconds)

    def http(self, method: str, route: str, status: int, seconds: float, *, received: int = 0, sent: int = 0) -> None:
        """A request was answered. `route` is the template (`/jobs/{id}`), never the path; bytes are of the bodies."""
        method = method if method in METHODS else "other"
        self._http.add((method, route, str(status)))
        self._http_seconds[method, route].observe(seconds)
        self._bytes_in.add(by=received)
        self._bytes_out.add(by=sent)

    def connections(self, count: Callable[[], int]) -> None:
        """How many connections are open is asked for when it is told."""
        self._connections.set_function(count)

    def devices(self, snapshot: Mapping[str, Any]) -> None:
        """The engine's snapshot that the gauges tell from now on."""
        self._snapshot.latest = snapshot

    def render(self) -> tuple[bytes, str]:
        """The page for Prometheus and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE

    def _counter(self, name: str, about: str, *labels: str) -> Counts:
        return Counts(self.registry, f"imagepool_{name}", about, *labels)

    def _histogram(self, name: str, about: str, bounds: tuple[float, ...], *labels: str) -> Histograms:
        return Histograms(self.registry, f"imagepool_{name}", about, bounds, *labels)

    def _new_stages(self, model: str, size: str) -> _Stages:
        key = (model, size) if len(self._by_job) < MOST_SERIES else ("other", size)
        stages = self._by_job[key] = _Stages(**{name: metric[key] for name, metric in self._stages.items()})
        return stages


class _Snapshot(Collector):
    """Turns the engine's latest snapshot into gauges. A value that is unknown has no line."""

    latest: Mapping[str, Any] | None = None

    def collect(self) -> Iterator[Metric]:
        if self.latest is None:
            return
        yield from _queue_gauges(self.latest.get("queue", {}))
        yield from _receiving_gauges(self.latest.get("receiving", {}))
        yield from _device_gauges(self.latest.get("workers", ()))
        yield _gauge("uptime_seconds", "Seconds since the server started.", self.latest.get("uptime"))
        yield _gauge("ready", "1 when a device can serve.", bool(self.latest.get("ready")))
        storage = self.latest.get("storage", {})
        yield _gauge("disk_free_bytes", "Bytes left on the disk of the outputs folder.", storage.get("free_bytes"))
        yield _gauge("disk_promised_bytes", "Room kept for results of accepted jobs.", storage.get("promised_bytes"))
        yield _gauge("results_waiting", "Finished jobs that the disk does not take yet.", storage.get("waiting"))
        yield _gauge("storage_full", "1 when the disk lets no new durable job be taken.", storage.get("state") != "ok")

    def describe(self) -> list[Metric]:
        return []


def _queue_gauges(queue: Mapping[str, Any]) -> Iterator[Metric]:
    depth = GaugeMetricFamily("imagepool_queue_depth", "Jobs that wait.", labels=["priority"])
    for priority, count in queue.get("by_priority", {}).items():
        depth.add_metric([str(priority)], count)
    yield depth
    yield _gauge("jobs_in_flight", "Jobs handed to a worker.", queue.get("running"))
    yield _gauge("queue_bytes", "Bytes of images held by jobs.", queue.get("bytes"))
    yield _gauge("queue_limit_jobs", "Most jobs that are admitted.", queue.get("limit_jobs"))
    yield _gauge("queue_limit_bytes", "Most bytes that are admitted.", queue.get("limit_bytes"))
    by_model: dict[str, int] = {}
    for group, count in queue.get("by_group", {}).items():
        kind = _job_type(str(group).partition(":")[0])
        by_model[kind] = by_model.get(kind, 0) + count
    imagen = GaugeMetricFamily("imagen_queue_depth", "Jobs that wait, by imagen's names.", labels=["queue_name"])
    for kind, count in list(by_model.items())[:MOST_SERIES]:
        imagen.add_metric([f"{kind}-jobs"], count)
    yield imagen


def _receiving_gauges(receiving: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("receiving_bodies", "Request bodies on their way.", receiving.get("bodies"))
    yield _gauge("receiving_bytes", "Bytes of those that have come.", receiving.get("bytes"))
    yield _gauge("receiving_limit_bytes", "Most such bytes at once.", receiving.get("limit_bytes"))


_DEVICE_GAUGES = (
    ("utilisation_ratio", "utilisation", "Utilisation of the device, 0-1."),
    ("memory_used_bytes", "memory_used", "Memory in use on the device."),
    ("memory_total_bytes", "memory_total", "Memory of the device."),
    ("temperature_celsius", "temperature", "Temperature of the device."),
    ("power_watts", "power", "Power drawn by the device."),
    ("incarnation", "incarnation", "Which life of the worker this is."),
    ("worker_resident_bytes", "rss", "Resident memory of the worker's process."),
)


def _device_gauges(workers: Any) -> Iterator[Metric]:
    up = GaugeMetricFamily("imagepool_device_up", "1 when its worker takes or runs batches.", labels=["device"])
    for worker in workers:
        up.add_metric([worker["worker"]], worker.get("state") in ("ready", "busy", "draining"))
    yield up
    for name, key, about in _DEVICE_GAUGES:
        family = GaugeMetricFamily(f"imagepool_device_{name}", about, labels=["device"])
        for worker in workers:
            if worker.get(key) is not None:
                family.add_metric([worker["worker"]], worker[key])
        yield family
    yield from _step_metrics([(worker["worker"], worker["steps"]) for worker in workers if worker.get("steps")])


_STEP_COUNTERS = (
    ("forwards", "Forwards of stepped models' denoisers."),
    ("rows", "Rows that those forwards carried."),
    ("preemptions", "How often a running job had to wait for an urgent one."),
)
_STEP_GAUGES = (
    ("rows_per_forward", "Rows of a forward, mean of the last seconds of work."),
    ("jobs_running", "Jobs that step on the device."),
    ("jobs_parked", "Jobs that wait on the device for others that go first."),
    ("steps_per_second", "Denoiser calls answered per second, mean of the last ten seconds."),
)


def _step_metrics(devices: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[Metric]:
    families: list[CounterMetricFamily | GaugeMetricFamily] = [
        *(CounterMetricFamily(f"imagepool_step_{name}", about, labels=["device"]) for name, about in _STEP_COUNTERS),
        *(GaugeMetricFamily(f"imagepool_step_{name}", about, labels=["device"]) for name, about in _STEP_GAUGES),
    ]
    for family, (name, _) in zip(families, (*_STEP_COUNTERS, *_STEP_GAUGES), strict=True):
        for device, steps in devices:
            if (value := steps[name.removeprefix("jobs_")]) is not None:
                family.add_metric([device], value)
    return iter(families if devices else ())


def _gauge(name: str, about: str, value: float | None) -> Metric:
    family = GaugeMetricFamily(f"imagepool_{name}", about)
    if value is not None:
        family.add_metric([], value)
    return family


def _job_type(model: str) -> str:
    """imagen's word for a model: style_comic -> style-comic."""
    return model.replace("_", "-")
