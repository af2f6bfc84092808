#!/usr/bin/env python3
"""A black-box test of a running server: many requests at once, seen through HTTP alone.

It asks for the system status, draws test pictures, submits them all together, follows every job, downloads each result
and checks that it is a PNG of the right size. The exit status is 0 only if every one of them succeeded.

    python test_concurrency.py --url http://localhost:8000 --count 16 --sizes 512x512,768x512 --plot latency.png

Nothing of the server is imported: httpx and Pillow do, rich (live progress) and matplotlib (--plot) are optional.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Protocol

import httpx
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    "Change the colors to purple and gold with magical sparkles",
    "Transform into a sunset scene with warm orange and pink colors",
    "Make it look like a winter landscape with snow and ice",
    "Convert to a vibrant spring garden with flowers and butterflies",
    "Create a futuristic cyberpunk style with neon lights",
    "Transform into an underwater scene with fish and coral",
    "Make it look like an autumn forest with falling leaves",
    "Convert to a space scene with stars and nebula",
    "Create a medieval castle scene with dragons",
    "Transform into a tropical beach with palm trees",
    "Make it look like a steampunk machine",
    "Convert to a fantasy forest with magical creatures",
    "Create a post-apocalyptic wasteland scene",
    "Transform into a Japanese zen garden",
    "Make it look like a colorful abstract painting",
    "Convert to a retro 80s style with bright colors",
)
BUSY = {429, 502, 503, 504}  # "not now": asked again after Retry-After
ROWS = 16  # requests shown in the live display at once

Size = tuple[int, int]
Say = Callable[[str], None]


class Stopped(Exception):
    """This cannot go on; the message says why."""


@dataclass(slots=True)
class Trial:
    """One request of the test and what became of it. Times are seconds; `submitted` counts from the start."""

    number: int
    prompt: str
    size: Size
    job: str = ""
    state: str = "unsent"
    submitted: float = 0.0
    total: float = 0.0
    processing: float = 0.0
    device: str | int | None = None
    ok: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """A job's status, whatever API told it. `done` is None while the job goes on, else whether it succeeded."""

    state: str
    done: bool | None
    progress: float
    processing: float
    device: str | int | None
    error: str


class Api(Protocol):
    """How jobs are submitted, watched and fetched."""

    id_field: str
    status_path: str
    result_path: str

    async def submit(self, client: httpx.AsyncClient, trial: Trial, png: bytes) -> httpx.Response: ...
    def read(self, answer: dict[str, Any]) -> Seen: ...

    def expected(self, size: Size) -> Size:
        return size


@dataclass(frozen=True, slots=True)
class EditApi(Api):
    """`/edit`, `/status/{id}`, `/result/{id}`: the API of the image edit service."""

    steps: int
    id_field = "request_id"
    status_path = "/status/{}"
    result_path = "/result/{}"

    async def submit(self, client: httpx.AsyncClient, trial: Trial, png: bytes) -> httpx.Response:
        form = {"prompt": trial.prompt, "num_inference_steps": str(self.steps), "seed": str(trial.number * 42)}
        return await client.post("/edit", data=form, files={"image": (f"test_{trial.number}.png", png, "image/png")})

    def read(self, answer: dict[str, Any]) -> Seen:
        state = str(answer["status"])
        done = {"completed": True, "error": False}.get(state)
        progress, spent = float(answer.get("progress") or 0.0), float(answer.get("processing_time") or 0.0)
        return Seen(state, done, progress, spent, answer.get("gpu_id"), str(answer.get("error") or ""))


@dataclass(frozen=True, slots=True)
class JobsApi(Api):
    """`POST /jobs`: any model of the server. `about` is its own description, from `GET /models/{name}`."""

    model: str
    about: dict[str, Any]
    prompt: str | None
    steps: int | None
    id_field = "id"
    status_path = "/jobs/{}"
    result_path = "/jobs/{}/result"

    async def submit(self, client: httpx.AsyncClient, trial: Trial, png: bytes) -> httpx.Response:
        known = self.about.get("params", {})
        wanted = {"prompt": self.prompt, "steps": self.steps, "seed": trial.number * 42}
        params = {name: value for name, value in wanted.items() if name in known and value is not None}
        files = {"image": (f"test_{trial.number}.png", png, "image/png")}
        if self.about.get("needs_mask") or self.about.get("task") == "inpaint":
            files["mask"] = ("mask.png", draw_mask(trial.size), "image/png")
        return await client.post("/jobs", data={"model": self.model, "params": json.dumps(params)}, files=files)

    def read(self, answer: dict[str, Any]) -> Seen:
        state = str(answer["state"])
        done = {"succeeded": True, "failed": False, "cancelled": False, "expired": False}.get(state)
        spent = float(answer["ended_at"]) - float(answer["started_at"]) if done else 0.0
        error = (answer.get("error") or {}).get("message", "")
        return Seen(state, done, float(answer.get("progress") or 0.0), spent, answer.get("device"), error)

    def expected(self, size: Size) -> Size:
        scale = int(self.about.get("params", {}).get("scale", {}).get("default") or 1)
        return size[0] * scale, size[1] * scale


def draw(number: int, size: Size) -> bytes:
    """A light-blue test PNG with a rectangle, an ellipse and the request's number, so that a mix-up can be seen."""
    width, height = size
    picture = Image.new("RGB", size, (173, 216, 230))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((width // 10, height // 10, width // 2, height // 2), fill=(200, 60, 60), outline=(90, 0, 0), width=3)
    pen.ellipse((width // 2, height // 3, width * 9 // 10, height * 9 // 10), fill=(250, 210, 70), outline=(120, 90, 0))
    font = ImageFont.load_default(size=max(10, min(size) // 8))
    pen.text((width // 8, height * 3 // 4), f"TEST{number}", fill=(20, 20, 60), font=font)
    return _png(picture)


def draw_mask(size: Size) -> bytes:
    """A mask over the rectangle's corner: white is to be filled."""
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).ellipse((size[0] // 3, size[1] // 3, size[0] * 2 // 3, size[1] * 2 // 3), fill=255)
    return _png(mask)


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def fault_of(png: bytes, expected: Size) -> str:
    """What is wrong with a downloaded result; empty when it is a whole PNG of the expected size."""
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            picture.load()
            size = picture.size
    except (OSError, SyntaxError, ValueError) as fault:
        return f"the result is no valid PNG: {fault}"
    return "" if size == expected else f"the result's size is {size}, expected {expected}"


@dataclass(slots=True)
class Session:
    """What all requests of one test share."""

    client: httpx.AsyncClient
    api: Api
    timeout: float
    keep: Path | None
    show: Display
    started: float

    async def attempt(self, trial: Trial, gate: asyncio.Semaphore) -> None:
        """Submit, follow, download, check. Whatever goes wrong is written into the trial."""
        async with gate:
            png = await asyncio.to_thread(draw, trial.number, trial.size)
            begun = time.perf_counter()
            trial.submitted = begun - self.started
            try:
                async with asyncio.timeout(self.timeout):
                    await self._follow(trial, png)
            except TimeoutError:
                trial.error = f"not finished within {self.timeout:g} s (state: {trial.state})"
            except (Stopped, httpx.HTTPError, KeyError, TypeError, ValueError) as fault:
                trial.error = str(fault) if isinstance(fault, Stopped) else f"{type(fault).__name__}: {fault}"
            trial.total = time.perf_counter() - begun
            trial.ok = not trial.error
            self.show.ended(trial)

    async def _follow(self, trial: Trial, png: bytes) -> None:
        if self.keep:
            (self.keep / f"concurrent_test_{trial.number}.png").write_bytes(png)
        trial.job = str((await self._ask(lambda: self.api.submit(self.client, trial, png))).json()[self.api.id_field])
        trial.state = "submitted"
        self.show.submitted(trial)
        await self._watch(trial)
        body = (await self._ask(lambda: self.client.get(self.api.result_path.format(trial.job)))).content
        if self.keep:
            (self.keep / f"concurrent_result_{trial.number}_{trial.job[:8]}.png").write_bytes(body)
        if fault := await asyncio.to_thread(fault_of, body, self.api.expected(trial.size)):
            raise Stopped(fault)

    async def _watch(self, trial: Trial) -> None:
        pause = 0.05
        while True:
            answer = await self._ask(lambda: self.client.get(self.api.status_path.format(trial.job)))
            seen = self.api.read(answer.json())
            before, trial.state = trial.state, seen.state
            trial.processing, trial.device = seen.processing, seen.device
            self.show.moved(trial, before, seen.progress)
            if seen.done:
                return
            if seen.done is False:
                raise Stopped(seen.error or f"the job ended as {seen.state}")
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.5)

    async def _ask(self, request: Callable[[], Any]) -> httpx.Response:
        """The answer of a request that the server may put off; anything but a 2xx in the end raises."""
        while True:
            answer: httpx.Response = await request()
            if answer.status_code not in BUSY:
                break
            wait = answer.headers.get("retry-after", "")
            await asyncio.sleep(min(10, int(wait)) if wait.isdecimal() else 1)
        if not answer.is_success:
            asked = f"{answer.request.method} {answer.request.url.path}"
            raise Stopped(f"{asked}: {answer.status_code} {complaint(answer)}")
        return answer


def complaint(answer: httpx.Response) -> str:
    """The sentence of an error answer."""
    try:
        return str(answer.json()["detail"])[:300]
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


class Display:
    """Lines on the screen; with rich and a terminal, live bars below them."""

    def __init__(self, count: int, say: Say, bars: Any = None) -> None:
        self.say, self.bars, self.rows = say, bars, dict[int, Any]()
        self.all = bars.add_task("all requests", total=count, state="") if bars else None

    def submitted(self, trial: Trial) -> None:
        self.say(f"Request {trial.number} submitted: {trial.job[:8]}")
        if self.bars and len(self.rows) < ROWS:
            self.rows[trial.number] = self.bars.add_task(f"request {trial.number}", total=1.0, state="submitted")

    def moved(self, trial: Trial, before: str, progress: float) -> None:
        if trial.state != before and trial.state not in ("completed", "succeeded"):
            self.say(f"Request {trial.number}: {before} -> {trial.state}")
        if trial.number in self.rows:
            self.bars.update(self.rows[trial.number], completed=progress, state=trial.state)

    def ended(self, trial: Trial) -> None:
        if trial.ok:
            times = f"{trial.processing:.2f}s processing, {trial.total:.2f}s total"
            self.say(f"✓ Request {trial.number} completed: {times} (GPU {trial.device})")
        else:
            self.say(f"✗ Request {trial.number} failed: {trial.error}")
        if self.bars:
            if (row := self.rows.pop(trial.number, None)) is not None:
                self.bars.remove_task(row)
            self.bars.advance(self.all)


@contextlib.contextmanager
def display(count: int, stream: Any) -> Iterator[Display]:
    """Rich bars where rich is installed and somebody watches, plain lines otherwise."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        Console = None  # type: ignore[assignment,misc]
    if Console is None or not stream.isatty():
        yield Display(count, lambda line: print(line, file=stream, flush=True))
        return
    name, state = progress.TextColumn("{task.description:<14}"), progress.TextColumn("{task.fields[state]}")
    columns = (name, progress.BarColumn(), progress.TaskProgressColumn(), progress.TimeElapsedColumn(), state)
    with progress.Progress(*columns, console=Console(file=stream), transient=True) as bars:
        yield Display(count, lambda line: bars.console.print(line, markup=False, highlight=False), bars)


def tell_system(status: dict[str, Any], say: Say) -> None:
    for words in ("Total GPUs", "Ready Workers", "Alive Processes"):
        say(f"  {words}: {status.get(words.lower().replace(' ', '_'))}")


def tell_devices(status: dict[str, Any], say: Say) -> None:
    for device in status.get("devices") or ():
        mean = device.get("mean_batch_size") or 0.0
        say(f"  {device.get('device')}: {device.get('images')} images in {device.get('batches')} batches"
            f" (mean batch {mean:.2f}), {device.get('restarts')} restarts")  # fmt: skip


def summary(trials: list[Trial], wall: float) -> dict[str, Any]:
    """The figures of the closing report."""
    good = [trial for trial in trials if trial.ok]
    totals = sorted(trial.total for trial in good)
    cuts = quantiles(totals, n=100, method="inclusive") if len(totals) > 1 else totals * 99
    processing = [trial.processing for trial in good]
    return {
        "requests": len(trials), "successful": len(good), "failed": len(trials) - len(good),
        "seconds": wall, "images_per_second": len(good) / wall if wall else 0.0,
        "average_processing": fmean(processing) if good else None, "average_total": fmean(totals) if good else None,
        "p50_total": cuts[49] if good else None, "p95_total": cuts[94] if good else None,
        "distribution": {str(key): n for key, n in sorted(Counter(t.device for t in good).items(), key=str)},
        "efficiency": sum(processing) / wall if wall else 0.0,
    }  # fmt: skip


def tell_report(figures: dict[str, Any], say: Say) -> None:
    distribution = ", ".join(f"{key}: {n}" for key, n in figures["distribution"].items())
    say("\n=== Test Results ===")
    for word, key in (("Total", "requests"), ("Successful", "successful"), ("Failed", "failed")):
        say(f"{word} requests: {figures[key]}")
    say(f"Total test time: {figures['seconds']:.2f}s ({figures['images_per_second']:.2f} images/s)")
    if figures["successful"]:
        say(f"Average processing time: {figures['average_processing']:.2f}s")
        say(f"Average total time: {figures['average_total']:.2f}s"
            f" (P50 {figures['p50_total']:.2f}s, P95 {figures['p95_total']:.2f}s)")  # fmt: skip
    say(f"GPU usage distribution: {{{distribution}}}")
    say(f"Concurrency efficiency: {figures['efficiency']:.2f}")


def plot(trials: list[Trial], file: Path) -> None:
    """Draw each request's waiting and processing over time, and the distribution of the totals, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (lanes, steps) = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=(2, 1), layout="constrained")
    colours = {device: f"C{i}" for i, device in enumerate(sorted({t.device for t in trials if t.ok}, key=str))}
    for row, trial in enumerate(trials):
        waited = max(0.0, trial.total - trial.processing)
        lanes.barh(row, waited, left=trial.submitted, color="lightgrey")
        colour = colours[trial.device] if trial.ok else "red"
        lanes.barh(row, trial.processing if trial.ok else 0.05, left=trial.submitted + waited, color=colour)
    for device, colour in colours.items():
        lanes.barh(0, 0, color=colour, label=f"device {device}")
    lanes.set(xlabel="seconds since the start", ylabel="request", title="waiting (grey) and processing")
    lanes.invert_yaxis()
    if colours:
        lanes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    totals = sorted(trial.total for trial in trials if trial.ok)
    steps.step(totals, [(i + 1) / len(totals) for i in range(len(totals))], where="post")
    steps.set(xlabel="seconds per request", ylabel="share of requests", title="total time", ylim=(0, 1.05))
    steps.set_xlim(left=0)
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


async def system_status(client: httpx.AsyncClient) -> dict[str, Any]:
    try:
        status: dict[str, Any] = (await client.get("/system/status")).raise_for_status().json()
        return status
    except httpx.HTTPStatusError as fault:
        raise Stopped(f"Cannot get system status: {complaint(fault.response)}") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        raise Stopped(f"Cannot get system status: is the server running at {client.base_url}? (--url)") from None


async def choose_api(client: httpx.AsyncClient, options: argparse.Namespace) -> Api:
    if options.model == "edit":
        return EditApi(30 if options.steps is None else options.steps)
    answer = await client.get(f"/models/{options.model}")
    if not answer.is_success:
        raise Stopped(f"Cannot use model {options.model}: {complaint(answer)}")
    return JobsApi(options.model, answer.json(), options.prompt, options.steps)


async def perform(options: argparse.Namespace, stream: Any) -> dict[str, Any]:
    """Run the whole test; the report as plain data. Raises `Stopped` when it cannot even begin."""

    def say(line: str) -> None:
        print(line, file=stream, flush=True)

    say("=== Multi-GPU Concurrent Test ===")
    headers = {"X-API-Key": options.key} if options.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=options.url, headers=headers, limits=limits, timeout=60.0) as client:
        before = await system_status(client)
        say("System status:")
        tell_system(before, say)
        if not (ready := int(before.get("ready_workers") or 0)):
            raise Stopped("No ready workers available")
        api = await choose_api(client, options)
        count = options.count or min(ready * 2, 16)
        prompts, sizes = [options.prompt] if options.prompt else PROMPTS, options.sizes
        trials = [Trial(i, prompts[i % len(prompts)], sizes[i % len(sizes)]) for i in range(count)]
        say(f"\nSubmitting {count} requests to {options.model}, {options.concurrency or count} at once...")
        gate = asyncio.Semaphore(options.concurrency or count)
        started = time.perf_counter()
        with display(count, stream) as show:
            session = Session(client, api, options.timeout, options.keep, show, started)
            async with asyncio.TaskGroup() as group:
                for trial in trials:
                    group.create_task(session.attempt(trial, gate))
        figures = summary(trials, time.perf_counter() - started)
        tell_report(figures, say)
        after = await system_status(client)
        say("\nFinal system status:")
        tell_system(after, say)
        tell_devices(after, say)
    if options.plot:
        await asyncio.to_thread(plot, trials, options.plot)
        say(f"\nLatency plot: {options.plot}")
    return {"summary": figures, "requests": [asdict(t) for t in trials], "system": {"before": before, "after": after}}


def read_sizes(text: str) -> list[Size]:
    try:
        sizes = [(int(width), int(height)) for width, height in (part.lower().split("x") for part in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list like 512x512,768x512") from None
    if not all(8 <= side <= 8192 for size in sizes for side in size):
        raise argparse.ArgumentTypeError("sides must be from 8 to 8192")
    return sizes


def read_count(text: str) -> int:
    if not text.isdecimal() or not (number := int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return number


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--url", default="http://localhost:8000", help="where the server is (default: %(default)s)")
    add("--count", type=read_count, help="how many requests (default: two per ready worker, at most 16)")
    add("--concurrency", type=read_count, help="how many of them at once (default: all)")
    add("--sizes", type=read_sizes, default=[(512, 512)], help="WxH,WxH,...: taken in turn (default: 512x512)")
    add("--model", default="edit", help="edit, or any other model, through POST /jobs (default: %(default)s)")
    add("--prompt", help="one prompt for all requests (default: sixteen different ones)")
    add("--steps", type=read_count, help="inference steps (default: 30 for edit, else the model's own)")
    add("--timeout", type=float, default=300.0, help="seconds one request may take in all (default: %(default)g)")
    add("--key", default=os.environ.get("IMAGEPOOL_KEY"), help="API key (default: $IMAGEPOOL_KEY)")
    add("--plot", type=Path, metavar="FILE", help="draw the latencies into this PNG (needs matplotlib)")
    add("--keep", type=Path, metavar="DIR", help="keep inputs and results in this folder")
    add("--json", action="store_true", help="print the report as JSON on stdout, the rest on stderr")
    options = parser.parse_args(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = read_options(arguments)
    stream = sys.stderr if options.json else sys.stdout
    try:
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(perform(options, stream))
    except (Stopped, ImportError, OSError) as stop:
        print(stop, file=stream)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(report, indent=2))
    return 0 if not report["summary"]["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
