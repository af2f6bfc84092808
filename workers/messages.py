"""The messages that cross the process line: small, frozen, named. Pixels never travel in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import ErrorInfo
from core.model import ModelSpec
from core.pickles import by_position
from core.request import ImagePart, OutputFormat, Span

# --- master -> worker ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Boot:
    """How an incarnation starts. `visible` is its CUDA_VISIBLE_DEVICES ("" for a CPU worker), `threads` torch's
    intra-op threads, `codec_threads` the decode/encode threads beside the device loop, `root` the outputs folder,
    `alike` whether all devices of the server are of one kind, `models_folder` where further adapters may lie."""

    worker: str
    incarnation: int
    device: str  # "cuda:0" (inside the child always the first visible one) or "cpu"
    visible: str
    threads: int
    codec_threads: int
    cpus: tuple[int, ...]  # affinity; empty: leave as it is
    specs: tuple[ModelSpec, ...]
    root: str
    arena_bytes: int
    warm_up: bool = True
    log_level: str = "info"
    boot_timeout: float = 600.0  # seconds until the worker must be ready, or a model be loaded that a batch needs
    loaded_models: int = 0  # most that stay loaded beside the preloaded ones; 0: any number
    alike: bool = True
    models_folder: str = ""


@by_position
@dataclass(frozen=True, slots=True)
class RunItem:
    """One job of a batch. `output` is where the encoded result goes, `size` the height and width that it must have;
    `images` name file or span, never bytes. `priority`, 0 urgent to 3 test, and `previews`, whether somebody wants to
    see the image grow, count for stepped models."""

    job: str
    images: tuple[ImagePart, ...]
    params: Mapping[str, Any]
    format: OutputFormat
    output: Span
    size: tuple[int, int]
    priority: int = 2
    previews: bool = False


@by_position
@dataclass(frozen=True, slots=True)
class RunBatch:
    """Jobs of one group for one model. A stepped model's job comes alone and runs beside all else."""

    batch: int
    model: str
    items: tuple[RunItem, ...]


@by_position
@dataclass(frozen=True, slots=True)
class Drop:
    """The job of that batch is no longer wanted; leave it out where that is still possible."""

    batch: int
    job: str


@dataclass(frozen=True, slots=True)
class GiveBack:
    """What that batch has not begun is better done elsewhere: end it between two of its parts, and say in `BatchDone`
    which jobs were not begun."""

    batch: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered by the loop that runs batches, when it is idle."""

    number: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what you hold, then exit."""


# --- worker -> master ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Progress:
    """Boot progress: what is being done (load, warm-up) and how far, 0-1."""

    what: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """Loaded and warmed up. `facts`: device name, memory, versions, seconds to load; `refused`: by name, why models
    could not be loaded."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BootFailed:
    """Cannot start; `error` says what to do about it. The process exits by itself."""

    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Loading:
    """The device loop has begun to load a model for that batch, or (`done`) is through with it, well or not. It does
    nothing else meanwhile."""

    batch: int
    model: str
    done: bool


@dataclass(frozen=True, slots=True)
class Alive:
    """That batch has come to a checkpoint of its model or to the encoding of a large result; the next sign of it may
    take `patience` seconds, where that is more than the master would wait."""

    batch: int
    patience: float = 0.0


@dataclass(frozen=True, slots=True)
class Stuck:
    """A codec thread has been busy with that batch, a stepped job, for longer than its model's timeout."""

    batch: int


@dataclass(frozen=True, slots=True)
class JobProgress:
    job: str
    fraction: float


@by_position
@dataclass(frozen=True, slots=True)
class JobParked:
    """The stepped job waits for others that go first, its state kept (`parked`), or goes on."""

    job: str
    parked: bool


@dataclass(frozen=True, slots=True)
class JobPreview:
    """What the job's image looks like so far: a small JPEG, at most one a second."""

    job: str
    jpeg: bytes


@dataclass(frozen=True, slots=True)
class StepReport:
    """The stepped jobs go on (at most twice a second), or none is left. Counts are of this incarnation: `forwards` of
    denoisers, the `rows` in them, how often an urgent job made another wait (`preemptions`); `running` and `parked`
    jobs are here now."""

    forwards: int
    rows: int
    preemptions: int
    steps_per_second: float
    running: int
    parked: int


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of one item: `size` > 0 bytes lie in its output span, or `error` is set."""

    job: str
    size: int = 0
    format: str = ""
    width: int = 0
    height: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: ErrorInfo | None = None


@by_position
@dataclass(frozen=True, slots=True)
class ItemsDone:
    """Items of one batch that are finished (in any order, in as many messages as it takes)."""

    batch: int
    items: tuple[Finished, ...]


@by_position
@dataclass(frozen=True, slots=True)
class BatchDone:
    """Every item of the batch has been answered, or is `returned` untouched after a `GiveBack`; `seconds` it spent in
    the device loop."""

    batch: int
    seconds: float
    returned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchDidNotFit:
    """Out of device memory; nothing of the batch was answered."""

    batch: int
    message: str


@dataclass(frozen=True, slots=True)
class Pong:
    number: int
    rss: int
    memory_used: int | None = None   # torch's view of its device, bytes
    memory_peak: int | None = None


ToWorker = RunBatch | Drop | GiveBack | Ping | Stop
FromWorker = (
    Progress | Ready | BootFailed | Loading | Alive | Stuck | JobProgress | JobParked | JobPreview | StepReport
    | ItemsDone | BatchDone | BatchDidNotFit | Pong
)
