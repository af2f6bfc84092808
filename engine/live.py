"""A job while it lives in this process, with everything that has to be given back when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from core.job import Job
from core.model import ModelSpec
from core.request import ImageRequest, Span
from core.ticket import Ticket
from engine.feed import Feed
from scheduler.admission import Grant

STAGES = ("decode", "wait", "compute", "encode")
OUTPUT_SLACK = 64 * 1024
MAX_ICC = 4 << 20
MAX_METADATA = 128 * 1024  # EXIF and text, of at most 64 KiB each


@dataclass(slots=True)
class Live:
    """`done` resolves with the job when it has ended and its end is stored. `spans` are inputs in shared memory;
    `flights` counts the batches that may still read them. `concluding`: its end is decided and being written."""

    job: Job
    spec: ModelSpec
    ticket: Ticket
    grant: Grant
    done: asyncio.Future[Job]
    spans: list[Span] = field(default_factory=list)
    flights: int = 0
    batch_size: int = 0
    concluding: bool = False
    cancelled: bool = False  # somebody asked for that
    feed: Feed | None = None
    result: Span | None = None  # of an ephemeral job, until its waiter has it
    heard: Callable[[float], None] | None = None  # its waiter, of progress
    seen: Callable[[bytes], None] | None = None  # its waiter, of previews

    def event_feed(self) -> Feed:
        """The job's event stream, made when somebody first asks."""
        if self.feed is None:
            self.feed = Feed(self.job)
        return self.feed


def output_size(live: Live) -> int:
    """The most bytes the encoded result can have: raw samples, four channels, plus what encoders add."""
    request = live.job.request
    image = request.image
    if live.spec.raw and image:
        return image.size + OUTPUT_SLACK
    height, width = live.spec.canvas(request.frame, request.params)
    samples = height * width * 4
    kept = MAX_METADATA if request.output.keep_metadata else 0
    return samples + samples // 50 + min(image.size if image else 0, MAX_ICC) + kept + OUTPUT_SLACK


def pixels(spec: ModelSpec, request: ImageRequest) -> int:
    """How many the result of a request has, as far as is known before it runs."""
    if spec.raw and request.image:
        return request.image.header.pixels
    height, width = spec.canvas(request.frame, request.params)
    return height * width


def timings(parts: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, in the order of the stages, rounded to the microsecond."""
    return {stage: round(parts[stage], 6) for stage in STAGES if stage in parts}
