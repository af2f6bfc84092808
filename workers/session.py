"""What a worker does all day: decode, compute, encode, three stages that overlap.

One thread reads the channel and hands the images of a batch to the codec threads at once, so that they are decoded
while the device still computes the batch before. The main thread is the device loop: it alone calls models, answers
pings, and so shows that it lives. Codec threads encode results into the spans that the master has reserved. Jobs of
stepped models share the loop with batches, step by step (`session_steps.py`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from core.errors import BadOutput, Cancelled, ErrorInfo, ImagePoolError, ModelFailed, OutOfMemory
from core.model import ModelSpec
from core.request import ImagePart, Span
from models.base import Adapter, Item, Output
from models.calls import lacks_memory
from models.checkpoint import Abandoned, Later, OutOfTime, beating, cancelled, checkpoint, recallable, wanted_for
from workers import codecs
from workers.arena import ArenaView
from workers.channel import WorkerEnd
from workers.drops import Drops
from workers.messages import (
    Alive,
    BatchDidNotFit,
    BatchDone,
    Boot,
    Drop,
    Finished,
    FromWorker,
    GiveBack,
    ItemsDone,
    JobProgress,
    Ping,
    Pong,
    Ready,
    RunBatch,
    RunItem,
    Stop,
)
from workers.metadata import Metadata
from workers.session_checks import check_output, plain, stored_input
from workers.session_models import Models
from workers.session_pulse import Pulse, took_too_long
from workers.session_steps import Steps
from workers.watermark import draw

PROGRESS_EVERY = 0.1  # seconds between two progress messages of one job
LARGE = 12 << 20  # samples of a result whose encoding may take long
BROKEN_DEVICE = 70  # exit code of a process whose CUDA context is beyond repair


@dataclass(slots=True)
class Decoded:
    """One decoded job, ready for the device, with what must be put back onto its result."""

    item: Item
    icc: bytes | None = None
    metadata: Metadata | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class Prepared:
    """A batch whose images are being decoded."""

    batch: RunBatch
    arrived: float
    decoding: list[Future[Decoded]]
    unanswered: int = 0
    returned: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Session:
    def __init__(self, boot: Boot, channel: WorkerEnd, arena_fd: int) -> None:
        self._boot, self._channel = boot, channel
        self._arena = ArenaView(arena_fd, boot.arena_bytes)
        self._specs = {spec.name: spec for spec in boot.specs}
        self._codecs = ThreadPoolExecutor(boot.codec_threads, thread_name_prefix="codec")
        self._queue: queue.SimpleQueue[Prepared | Ping | Stop] = queue.SimpleQueue()
        self._batches: deque[Prepared] = deque()  # taken out of it, not run yet
        self._dropped = Drops()
        self._stopping = False
        self._process = psutil.Process()

    # --- starting ---------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load and warm up the models, and say so. Raises what keeps all of them from loading, or the device from
        working."""
        torch.set_num_threads(max(1, self._boot.threads))
        self._device = torch.device(self._boot.device)
        self._steps = Steps(self._device, self, self._channel, self._codecs)
        self._models = Models(self._boot, self._device, self._channel, self._steps)
        if self._device.type == "cuda":
            torch.zeros(1, device=self._device)  # fails here, with its reason, rather than at the first job
        self._models.preload()
        self._channel.send(Ready(self._facts(time.time() - self._process.create_time())))

    def adapter(self, spec: ModelSpec, batch: int | None = None) -> Adapter:
        """The loaded model, perhaps for a batch. Raises whatever keeps it from loading."""
        return self._models.get(spec, batch)

    def _facts(self, seconds: float) -> dict[str, object]:
        facts: dict[str, object] = {
            "torch": str(torch.__version__),  # a class of torch's own, with which the master would have to import torch
            "threads": torch.get_num_threads(),
            "seconds_to_load": round(seconds, 2), "models": len(self._models),
            "refused": self._models.refused,
        }
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            return facts | {"name": properties.name, "memory_total": properties.total_memory}
        return facts | {"name": platform.processor() or platform.machine()}

    # --- the two loops ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """The device loop: until told to stop. If the master goes away, the process ends where it stands. All messages
        that are there are taken; then a batch is run, unless steps go first, and a step is made after it."""
        threading.Thread(target=self._listen, name="channel", daemon=True).start()
        while not self._stopping or self._steps.holding or self._batches:
            self._turn()
        self._codecs.shutdown(wait=True)

    def _turn(self) -> None:
        work: Prepared | Ping | Stop | None = None
        if not (busy := bool(self._steps.busy or self._batches)):
            self._steps.waited(0.0)  # nobody does: what was owed is forgiven
        with contextlib.suppress(queue.Empty):
            work = self._queue.get(block=not busy)
        match work:
            case None:
                if self._batches and not self._steps.first:
                    began = time.monotonic()
                    self._compute(self._batches.popleft())
                    self._steps.waited(time.monotonic() - began)
                self._steps.advance()
            case Prepared() if self._specs[work.batch.model].stepped:
                self._steps.join(work, self._specs[work.batch.model])
            case Prepared():
                self._batches.append(work)
            case Ping(number):
                self._channel.send(self._pong(number))
            case Stop():
                self._stopping = True

    def _listen(self) -> None:
        try:
            while True:
                for message in self._channel.receive():
                    match message:
                        case RunBatch():
                            self._take(message)
                        case Drop(batch, job):
                            self._dropped.drop(batch, job)
                        case GiveBack(batch):
                            self._dropped.recall(batch)
                        case _:
                            self._queue.put(message)
        except EOFError:
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _take(self, batch: RunBatch) -> None:
        """Have a batch decoded. The loop waits for the images of an ordinary one; while those of a stepped job are
        decoded, others go on."""
        self._dropped.hold(batch.batch)
        prepared = self._prepare(batch)
        if self._specs[batch.model].stepped:
            self._steps.holding.add(batch.batch)
            prepared.decoding[0].add_done_callback(lambda _: self._queue.put(prepared))
        else:
            self._queue.put(prepared)

    def _pong(self, number: int) -> Pong:
        used = peak = None
        if self._device.type == "cuda":
            used, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return Pong(number, self._process.memory_info().rss, used, peak)

    # --- decode -----------------------------------------------------------------------------------------------------

    def _prepare(self, batch: RunBatch) -> Prepared:
        if self._specs[batch.model].raw:
            decoding = [self._raw(item) for item in batch.items]
        else:
            decode = self._watched(batch, self._decode)
            decoding = [self._codecs.submit(decode, batch, item) for item in batch.items]
        return Prepared(batch, time.perf_counter(), decoding, unanswered=len(batch.items))

    def _watched(self, batch: RunBatch, work: Callable[..., Any]) -> Callable[..., Any]:
        """A codec thread's work for a stepped job, which others do not wait for, is watched for how long it takes."""
        spec = self._specs[batch.model]
        return partial(self._steps.watched, batch.batch, spec.timeout, work) if spec.stepped else work

    def _raw(self, item: RunItem) -> Future[Decoded]:
        """There is nothing to decode, so no codec thread is troubled."""
        future: Future[Decoded] = Future()
        try:
            future.set_result(Decoded(Item(item.params, data=memoryview(self._bytes(item.images[0])))))
        except Exception as fault:
            future.set_exception(fault)
        return future

    def _decode(self, batch: RunBatch, item: RunItem) -> Decoded:
        began = time.perf_counter()
        self._refuse_dropped(batch.batch, item.job)
        wanted = Item(
            item.params, size=item.size, previews=item.previews, report=self._reporter(item.job),
            cancelled=lambda: (batch.batch, item.job) in self._dropped,
        )
        decoded = Decoded(wanted)
        for part in item.images:
            if part.role == "mask" and wanted.image is not None:
                wanted.mask = codecs.decode_mask(
                    self._bytes(part), part.header, (wanted.image.shape[1], wanted.image.shape[0])
                )
                continue
            picture = codecs.decode(self._bytes(part), part.header, keep_metadata=item.format.keep_metadata)
            if part.role == "image":
                wanted.image, wanted.alpha = picture.image, picture.alpha
                decoded.icc, decoded.metadata = picture.icc, picture.metadata
            elif part.role == "control":
                wanted.control = picture.image
            else:
                wanted.references = (*wanted.references, picture.image)
        if (adapter := self._models.ready(batch.model)) is not None:  # else it is loaded in the device's loop
            adapter.prepare(wanted)
        decoded.seconds = time.perf_counter() - began
        return decoded

    def _bytes(self, part: ImagePart) -> bytes | memoryview:
        if isinstance(part.data, Span):
            return self._arena.view(part.data)
        if isinstance(part.data, str):
            return stored_input(Path(self._boot.root, part.data), part.size)
        return memoryview(part.data)

    def _reporter(self, job: str) -> Callable[[float], None]:
        last = 0.0

        def report(fraction: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PROGRESS_EVERY:
                last = now
                self._channel.send(JobProgress(job, min(max(fraction, 0.0), 1.0)))

        return report

    def _refuse_dropped(self, batch: int, job: str) -> None:
        if (batch, job) in self._dropped:
            raise Cancelled("the job was cancelled before it ran")

    # --- compute ----------------------------------------------------------------------------------------------------

    def _compute(self, prepared: Prepared) -> None:
        batch, spec = prepared.batch, self._specs[prepared.batch.model]
        ready: list[tuple[RunItem, Decoded]] = []
        for run_item, decoding in zip(batch.items, prepared.decoding, strict=True):
            try:
                decoded = decoding.result()
                self._refuse_dropped(batch.batch, run_item.job)
                ready.append((run_item, decoded))
            except Exception as fault:
                self._answer(prepared, Finished(run_item.job, error=self._info(fault, run_item.job, spec)))
        if not ready:
            return
        if self._dropped.recalled(batch.batch):
            self._answer(prepared, returned=[item.job for item, _ in ready])
            return
        began = time.perf_counter()
        handed: dict[str, Future[None]] = {}
        hand_over = partial(self._hand_over, prepared, spec, began, handed)
        if not spec.raw:
            for run_item, decoded in ready:
                decoded.item.done = partial(hand_over, run_item, decoded)
        outputs: list[Output | ErrorInfo | Exception | None] | None = None
        try:
            items = [(item.job, decoded.item) for item, decoded in ready]
            outputs = self._run_guarded(spec, batch.batch, items, handed)
        except self._out_of_memory as fault:
            message = str(fault)
        if outputs is None:  # not done above, where the exception keeps alive what filled the memory
            self._models.free_memory()
            wait(handed.values())  # they still write into room that the master now takes back
            if len(handed) < len(ready):
                self._dropped.forget(batch.batch)
                self._channel.send(BatchDidNotFit(batch.batch, message))
            return
        finished: list[Finished] = []
        returned: list[str] = []
        for (run_item, decoded), output in zip(ready, outputs, strict=True):
            if run_item.job in handed or output is None:
                continue
            if isinstance(output, Later):
                returned.append(run_item.job)
            elif spec.raw:
                timings = self._timings(prepared, decoded, began)
                finished.append(self._store(run_item, decoded, self._checked(output, run_item, spec), timings, spec))
            else:
                hand_over(run_item, decoded, output)
        if finished or returned:
            self._answer(prepared, *finished, returned=returned)

    def _hand_over(
        self, prepared: Prepared, spec: ModelSpec, began: float, handed: dict[str, Future[None]], item: RunItem,
        decoded: Decoded, output: Output | ErrorInfo | Exception,
    ) -> None:
        """Let a result be encoded and answered, also while the device still computes others of its batch."""
        known, timings = self._checked(output, item, spec), self._timings(prepared, decoded, began)
        handed[item.job] = self._codecs.submit(self._encode, prepared, item, decoded, known, timings, spec)

    def _checked(self, output: Output | ErrorInfo | Exception, item: RunItem, spec: ModelSpec) -> Output | ErrorInfo:
        if not isinstance(output, Exception):
            return output
        if not isinstance(output, ImagePoolError):
            self._leave_broken_device()
        return self._info(output, item.job, spec)

    def _timings(self, prepared: Prepared, decoded: Decoded, began: float) -> dict[str, float]:
        """Of an item that has just been computed, in seconds; that of the batch so far is noted, too."""
        prepared.seconds = time.perf_counter() - began
        waited = max(0.0, began - prepared.arrived - decoded.seconds)
        return {"decode": decoded.seconds, "wait": waited, "compute": prepared.seconds}

    def decoded(self, prepared: Prepared) -> Decoded:
        """A stepped job, decoded. Raises what its decoding raised, and `Cancelled`."""
        decoded = prepared.decoding[0].result()
        self._refuse_dropped(prepared.batch.batch, prepared.batch.items[0].job)
        return decoded

    @property
    def _out_of_memory(self) -> tuple[type[BaseException], ...]:
        return (MemoryError, torch.OutOfMemoryError)

    def _run_guarded(
        self, spec: ModelSpec, batch: int, items: Sequence[tuple[str, Item]], handed: Container[str]
    ) -> list[Output | ErrorInfo | Exception | None]:
        """The batch's outputs. When the batch raises or takes too long, each item runs alone, so that only the
        guilty one fails; None for those that are handed over already."""
        try:
            adapter, asked = self.adapter(spec, batch), [item for _, item in items]
            pulse = Pulse(self._channel, batch, spec.timeout)
            recalled = partial(self._dropped.recalled, batch)
            with torch.inference_mode(), wanted_for(asked), beating(pulse, pulse.renew), recallable(recalled):
                checkpoint()
                outputs = adapter.run(asked)
            if len(outputs) != len(items):
                raise BadOutput(f"model '{spec.name}' answered {len(outputs)} results for {len(items)} images")
            return list(outputs)
        except self._out_of_memory:
            raise
        except Abandoned:
            return [None if job in handed else cancelled().info() for job, _ in items]
        except OutOfTime:
            if len(items) == 1:
                return [None if job in handed else took_too_long(spec).info() for job, _ in items]
        except Exception as fault:
            if lacks_memory(fault):
                raise torch.OutOfMemoryError(str(fault)) from None
            self._leave_broken_device()
            if len(items) == 1 or spec.name not in self._models:
                return [None if job in handed else self._info(fault, job, spec) for job, _ in items]
        return [
            None if job in handed else self._run_guarded(spec, batch, [(job, item)], handed)[0] for job, item in items
        ]

    def _leave_broken_device(self) -> None:
        """After some faults (an illegal access, a device-side assertion) a CUDA context answers every call with the
        same error. Only a new process helps; the master gives its jobs another try."""
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except self._out_of_memory:
            return
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(BROKEN_DEVICE)

    # --- encode and answer ------------------------------------------------------------------------------------------

    def finish(
        self, prepared: Prepared, decoded: Decoded | None, output: Output | ErrorInfo, timings: dict[str, float]
    ) -> None:
        """Encode and answer a stepped job, in a codec thread."""
        (item,), spec = prepared.batch.items, self._specs[prepared.batch.model]
        decoded = decoded or Decoded(Item(item.params))
        encode = self._watched(prepared.batch, self._encode)
        self._codecs.submit(encode, prepared, item, decoded, output, timings, spec)

    def _encode(
        self, prepared: Prepared, item: RunItem, decoded: Decoded, output: Output | ErrorInfo,
        timings: dict[str, float], spec: ModelSpec,
    ) -> None:
        if isinstance(output, Output) and output.image is not None and output.image.size >= LARGE and not spec.stepped:
            self._channel.send(Alive(prepared.batch.batch, spec.timeout))
        self._answer(prepared, self._store(item, decoded, output, timings, spec))

    def _store(
        self, item: RunItem, decoded: Decoded, output: Output | ErrorInfo, timings: dict[str, float],
        spec: ModelSpec,
    ) -> Finished:
        if isinstance(output, ErrorInfo):
            return Finished(item.job, timings=timings, error=output)
        try:
            if decoded.item.cancelled():
                raise cancelled()
            began = time.perf_counter()
            if spec.raw:
                assert output.data is not None
                data, (height, width) = output.data, (0, 0)
                kind = str(item.images[0].header.format)
            else:
                image = check_output(output.image, decoded.item, spec)
                if item.format.watermark is not None:
                    image = draw(image, item.format.watermark)
                height, width = image.shape[:2]
                kind = str(item.format.format)
                data = codecs.encode(
                    image, item.format.format, quality=item.format.quality, subsampling=item.format.subsampling,
                    icc=decoded.icc, metadata=decoded.metadata,
                    alpha=decoded.item.alpha if image.ndim == 3 and image.shape[2] == 3 else None,
                )
            room = self._arena.room(item.output)
            if len(data) > len(room):
                raise BadOutput("the result is larger than any image of its size can be")
            room[: len(data)] = data
            timings["encode"] = time.perf_counter() - began
            return Finished(item.job, len(data), kind, width, height, timings, plain(output.facts, spec))
        except Exception as fault:
            return Finished(item.job, timings=timings, error=self._info(fault, item.job, spec))

    def _answer(self, prepared: Prepared, *finished: Finished, returned: Sequence[str] = ()) -> None:
        """Tell the master of items that are done; after the last one, of the batch and what was not begun of it."""
        messages: list[FromWorker] = [ItemsDone(prepared.batch.batch, finished)] if finished else []
        with prepared.lock:  # held while sending: what is unanswered when the batch ends counts as lost
            prepared.returned += returned
            prepared.unanswered -= len(finished) + len(returned)
            if prepared.unanswered == 0:
                self._dropped.forget(prepared.batch.batch)
                messages.append(BatchDone(prepared.batch.batch, prepared.seconds, tuple(prepared.returned)))
            self._channel.send(*messages)

    # --- faults -----------------------------------------------------------------------------------------------------

    def _known(self, fault: Exception, job: str, spec: ModelSpec) -> ImagePoolError:
        """The fault as one of our own errors; a strange one is logged here, with its trace, and told without."""
        if isinstance(fault, ImagePoolError):
            return fault
        if isinstance(fault, self._out_of_memory):
            return OutOfMemory(f"model '{spec.name}' ran out of memory with this image; send a smaller one")
        print(f"job {job}, model {spec.name}:", file=sys.stderr)
        traceback.print_exception(fault)
        return ModelFailed(
            f"model '{spec.name}' could not process this image ({type(fault).__name__}); "
            "the server's log has the details"
        )

    def told(self, fault: Exception, job: str, spec: ModelSpec) -> ErrorInfo:
        """What ended a stepped job, as clients are told it. Does not return when it broke the device."""
        if not isinstance(fault, (ImagePoolError, *self._out_of_memory)):
            self._leave_broken_device()
        return self._info(fault, job, spec)

    def _info(self, fault: Exception, job: str, spec: ModelSpec) -> ErrorInfo:
        return self._known(fault, job, spec).info()
