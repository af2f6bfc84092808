"""W3, inpainting: IOPaint's own clients' requests to IOPaint and to this server, with the same TorchScript network.

    python -m bench.inpaint [--runs 5] [--add] [--pictures 512 1200x800] [--connections 1 6 64]
                            [--networks light LaMa] [--quick]

IOPaint 1.6.0 is measured as it is, and without the full garbage collection after every request. Every round starts each
server anew, alone, proves that all answer with the same pixels, and lets so many connections send a fixed number of
requests. CPU is that of all of a server's processes; what the network alone takes on one thread is measured in the same
round, taken out of it and shown apart. `--add` puts the rounds to those of the last time. Writes
bench/results/inpaint.json and inpaint.png.

Two networks: a light one, beside which the servers can be seen, and one that costs what LaMa does (170 ms of CPU at
512² where the light one takes 24), under which they have little to win. On CPUs only: no GPU is asked for.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import uvloop
from PIL import Image
from rich.progress import Progress

from bench import lama_net
from bench.common import RESULTS, machine_facts, photograph, write_result
from bench.load import Run
from bench.runs import OURS, goal, parser, plot, print_tables, save, show, spread, table
from bench.servers import IOPAINT, ROOT, Server, ours, peer

STOCK, NO_GC = "IOPaint", "IOPaint, no gc"
COLOURS = {STOCK: "#30638e", NO_GC: "#9fb4c7", OURS: "#d1495b"}
PACKAGES = ("torch", "numpy", "pillow", "opencv-python-headless", "orjson", "pydantic")
NETWORKS = {"light": (4, 1), "LaMa": (16, 2)}  # channels of the first layer, residual blocks
REQUESTS = {1: (8, 30), 6: (18, 90), 64: (64, 256)}  # by connections: of IOPaint's, of ours, which is quicker
HEAVY = " (LaMa)"
STAGES = ("decode", "compute", "encode")
WARM = 8  # requests that are not counted
ALONE = 2.0  # seconds for which the network alone is measured
JSON = "application/json"


class Case(NamedTuple):
    """A picture with its request. `forwards`: the sizes (height, width) that the network sees."""

    body: bytes
    image: np.ndarray
    mask: np.ndarray
    forwards: tuple[tuple[int, int], ...]


class Measured(NamedTuple):
    """One load on one server. Requests per second, seconds, CPU milliseconds per request, and what the network alone
    takes of these; how many requests a second it alone would do on all cores; MiB of all processes."""

    rate: float
    p50: float
    p99: float
    cpu_ms: float
    network_ms: float
    limit: float
    memory: float

    @property
    def server_ms(self) -> float:
        """CPU milliseconds per request without the network."""
        return self.cpu_ms - self.network_ms

    @property
    def cores(self) -> float:
        """That it got. Beside other load a server with more threads gets more of them, and so does more."""
        return self.rate * self.cpu_ms / 1e3

    @property
    def share(self) -> float:
        """Of the rate that the network alone reaches on the same cores."""
        return self.rate / self.limit


Found = dict[str, dict[str, list[Measured]]]  # by "picture (network), connections" and server, a measurement per round
Spent = dict[str, dict[str, list[float]]]  # by picture and stage, milliseconds of one request of ours, alone, per round


def small() -> Case:
    """A photograph of 512² with one hole: the network sees it whole."""
    return _case(photograph(512), [(180, 160, 330, 300)], ((512, 512),))


def large() -> Case:
    """A photograph of 1200 x 800 with two holes: Crop shows the network 128 pixels around each."""
    return _case(photograph(1200)[:800], [(200, 200, 280, 304), (520, 840, 600, 944)], ((336, 360), (336, 360)))


PICTURES = {"512": small, "1200x800": large}


def _case(image: np.ndarray, holes: list[tuple[int, int, int, int]], forwards: tuple[tuple[int, int], ...]) -> Case:
    """`holes`: top, left, bottom, right. The body is that of IOPaint's page: data: URLs, the mask with alpha, its two
    misspelt names, and what it sends for models that do not run."""
    stroke = np.zeros((*image.shape[:2], 4), np.uint8)
    for top, left, bottom, right in holes:
        stroke[top:bottom, left:right] = (255, 204, 0, 187)
    body = {
        "image": _url(image), "mask": _url(stroke), "ldm_steps": 30, "ldm_sampler": "ddim", "zits_wireframe": True,
        "cv2_flag": "INPAINT_NS", "cv2_radius": 5, "hd_strategy": "Crop", "hd_strategy_crop_triger_size": 640,
        "hd_strategy_crop_margin": 128, "hd_trategy_resize_imit": 2048, "prompt": "", "negative_prompt": "",
        "use_croper": False, "use_extender": False, "sd_mask_blur": 12, "sd_strength": 1.0, "sd_steps": 50,
        "sd_guidance_scale": 7.5, "sd_sampler": "DPM++ 2M", "sd_seed": -1, "sd_match_histograms": False,
        "sd_lcm_lora": False, "paint_by_example_example_image": None, "enable_controlnet": False,
        "controlnet_conditioning_scale": 0.4, "controlnet_method": "", "enable_brushnet": False,
        "brushnet_method": "random_mask", "powerpaint_task": "text-guided", "fitting_degree": 1.0,
    }  # fmt: skip
    return Case(json.dumps(body).encode(), image, stroke[:, :, 3] > 0, forwards)


def _url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Fixed(Run):
    """So many requests over so many connections, each sending the next when its answer is there."""

    def __init__(self, url: str, body: bytes, count: int) -> None:
        super().__init__(url, body, JSON, [])
        self.count = count

    def answered(self, now: float, began: float, status: bytes) -> None:
        super().answered(now, began, status)
        self.over = self.asked == self.count  # then this connection sends no other
        self.asked += not self.over
        if sum(self.statuses.values()) == self.count:
            self.finished.set()

    async def all(self, connections: int) -> tuple[float, list[float]]:
        """Seconds for all of them, and of each, in order. Ends the program when one fails."""
        self.loop = asyncio.get_running_loop()
        self.latencies, self.statuses, self.asked = [], {}, connections
        self.finished = asyncio.Event()
        self.start, self.end = time.perf_counter(), float("inf")
        for _ in range(connections):
            await self.connect()
        async with asyncio.timeout(600):
            await self.finished.wait()
        if self.statuses != {"200": self.count}:
            raise SystemExit(f"{self.url} answered {self.statuses}")
        return time.perf_counter() - self.start, sorted(self.latencies)


def measure(server: Server, case: Case, connections: int, count: int, network: Alone) -> Measured:
    warm = min(connections, WARM)
    uvloop.run(Fixed(server.url, case.body, warm).all(warm))
    before = server.cost()
    seconds, latencies = uvloop.run(Fixed(server.url, case.body, count).all(connections))
    after = server.cost()
    at = lambda share: latencies[min(count - 1, int(count * share))]  # noqa: E731
    cpu = (after.tree - before.tree) / count * 1e3
    return Measured(count / seconds, at(0.5), at(0.99), cpu, network.cpu_ms, network.limit, memory(server))


def memory(server: Server) -> float:
    """MiB of all its processes; what they share counts once."""
    root = psutil.Process(server.process.pid)
    return sum(one.memory_full_info().pss for one in (root, *root.children(recursive=True))) / 2**20


class Alone(NamedTuple):
    """The network alone, for one request: CPU milliseconds, and how many a second all cores together would do."""

    cpu_ms: float
    limit: float


def alone(file: Path, case: Case) -> Alone:
    """On every core a process with one thread, all at the same time."""
    cores = psutil.cpu_count() or 1
    wall = cpu = 0.0
    for height, width in case.forwards:
        command = (sys.executable, "-m", "bench.lama_net", str(file), str(height), str(width), str(ALONE))
        running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(cores)]
        costs = [[float(number) for number in one.communicate()[0].split()] for one in running]
        wall += float(np.mean([one[0] for one in costs]))
        cpu += float(np.mean([one[1] for one in costs]))
    return Alone(cpu * 1e3, cores / wall)


def answer(server: Server, case: Case) -> np.ndarray:
    """The picture that one request gets."""
    request = urllib.request.Request(server.url, case.body, {"Content-Type": JSON})
    with urllib.request.urlopen(request, timeout=120) as found:
        return np.asarray(Image.open(io.BytesIO(found.read())))


def prove(name: str, found: np.ndarray, case: Case, before: dict[str, np.ndarray]) -> str:
    """That every byte outside the hole stayed, the hole was filled, and another server gave the same pixels (at most
    one grey level apart on one sample in ten thousand, where threads sum in another order). The pixels' digest."""
    assert np.array_equal(found[~case.mask], case.image[~case.mask]), f"{name} changed what no mask covers"
    assert not np.array_equal(found[case.mask], case.image[case.mask]), f"{name} filled nothing"
    first = before.setdefault("first", found)
    apart = np.abs(found.astype(int) - first)
    assert apart.max() <= 1 and np.count_nonzero(apart) <= 1e-4 * apart.size, f"{name} gives other pixels"
    return hashlib.sha256(found.tobytes()).hexdigest()[:16]


def servers(cache: Path) -> dict[str, Callable[[], AbstractContextManager[Server]]]:
    """How to start each. All find the weights where IOPaint keeps them."""
    home = {"XDG_CACHE_HOME": str(cache)}
    devices = f"cpu:{psutil.cpu_count()}"
    return {
        STOCK: partial(peer, IOPAINT, "inpaint", home),
        NO_GC: partial(peer, IOPAINT, "inpaint-no-gc", home),
        OURS: partial(ours, models="models/repository", offer="lama", path=IOPAINT.path, devices=devices, environ=home),
    }


@contextlib.contextmanager
def weights(width: int, blocks: int) -> Iterator[tuple[Path, int]]:
    """A cache folder with the network in it, where both look for big-lama.pt, and the number of its weights."""
    with tempfile.TemporaryDirectory(prefix="imagepool-bench-") as folder:
        place = Path(folder, "torch", "hub", "checkpoints")
        place.mkdir(parents=True)
        yield Path(folder), lama_net.save(place / "big-lama.pt", width, blocks)


def in_stages(server: Server) -> dict[str, float]:
    """Ours only: seconds that its workers have spent in each stage so far."""
    lines = server.get("/metrics").decode().splitlines()
    return {
        stage: sum(float(line.split()[-1]) for line in lines if line.startswith(f"imagepool_job_{stage}_seconds_sum"))
        for stage in STAGES
    }


def spend(spent: Spent, picture: str, server: Server, load: Callable[[], Measured], count: int) -> Measured:
    """Our server under one connection; where the time of a request goes is noted."""
    before = in_stages(server)
    measured, after = load(), in_stages(server)
    told = {stage: (after[stage] - before[stage]) * 1e3 / count for stage in STAGES}
    told |= {"the network alone": measured.network_ms, "CPU of all": measured.cpu_ms}
    for stage, milliseconds in told.items():
        spent.setdefault(picture, {}).setdefault(stage, []).append(milliseconds)
    return measured


def one_round(
    found: Found, spent: Spent, cases: Mapping[str, Case], given: Any, cache: Path, step: Callable[[str], None]
) -> None:
    """Every server once, with every picture and every number of connections, and one network."""
    file = cache / "torch" / "hub" / "checkpoints" / "big-lama.pt"
    networks = {picture: alone(file, case) for picture, case in cases.items()}
    shown: dict[str, dict[str, np.ndarray]] = {picture: {} for picture in cases}
    for name, start in servers(cache).items():
        with start() as server:
            for picture, case in cases.items():
                digest = prove(name, answer(server, case), case, shown[picture])
                step(f"{name}, {picture}: {digest}")
                for count in given.connections:
                    requests = max(count, REQUESTS[count][name == OURS] // (4 if given.quick else 1))
                    load = partial(measure, server, case, count, requests, networks[picture])
                    ours_alone = name == OURS and count == 1
                    measured = spend(spent, picture, server, load, requests + 1) if ours_alone else load()
                    found.setdefault(key(picture, count), {}).setdefault(name, []).append(measured)


def key(picture: str, connections: int) -> str:
    return f"{picture}, {connections}"


def pairs(told: Mapping[str, list[Measured]], other: str, what: str) -> dict[str, float]:
    """Ours over another's, round by round."""
    both = zip(told[OURS], told[other], strict=True)
    return spread(getattr(mine, what) / getattr(theirs, what) for mine, theirs in both)


def goals(found: Found) -> list[dict[str, Any]]:
    """Beside a light network it counts what the server takes, under one of LaMa's cost how many it serves."""
    reached = []
    for case, told in found.items():
        if HEAVY in case:
            for other, times in ((STOCK, 2.5), (NO_GC, 1.5)):
                rate = pairs(told, other, "rate")
                what = f"W3 throughput against {other} ({case} connections)"
                reached.append(goal(what, f"≥ {times}x", rate, rate["median"] >= times, unit="x"))
            continue
        for other, wanted in ((STOCK, 75), (NO_GC, 50)):
            what = f"W3 CPU per request against {other}, network taken out ({case} connections)"
            reached.append(less(what, pairs(told, other, "server_ms"), wanted))
        if case.endswith(" 6"):
            rate = pairs(told, STOCK, "rate")
            what = f"W3 throughput against {STOCK} ({case} connections)"
            reached.append(goal(what, "≥ 2.5x", rate, rate["median"] >= 2.5, unit="x"))
            reached.append(less(f"W3 P50 against {STOCK} ({case} connections)", pairs(told, STOCK, "p50"), 60))
    return reached


def less(what: str, left: Mapping[str, float], wanted: int) -> dict[str, Any]:
    """The goal that so many per cent are saved, where this share is left."""
    change = {at: 100 * (share - 1) for at, share in left.items()}
    return goal(what, f"-{wanted} %", change, change["median"] <= -wanted, "{:.0f}", " %")


def tables(found: Found) -> list[dict[str, Any]]:
    head = [
        "server", "requests/s", "P50 ms", "P99 ms", "CPU ms/request", "the network's", "without it",
        "of the network's own rate", "cores", "MiB",
    ]  # fmt: skip
    return [
        table(f"W3, {case} connections", head, [
            [
                name, show(spread(m.rate for m in told[name]), "{:.1f}"),
                show(spread((m.p50 * 1e3 for m in told[name]), 0), "{:,.0f}"),
                show(spread((m.p99 * 1e3 for m in told[name]), 0), "{:,.0f}"),
                show(spread(m.cpu_ms for m in told[name]), "{:.1f}"),
                show(spread(m.network_ms for m in told[name]), "{:.1f}"),
                show(spread(m.server_ms for m in told[name]), "{:.1f}"),
                show(spread(m.share for m in told[name])),
                show(spread(m.cores for m in told[name])),
                f"{spread(m.memory for m in told[name])['median']:.0f}",
            ]
            for name in told
        ])
        for case, told in found.items()
    ]  # fmt: skip


def stages(spent: Spent) -> dict[str, Any]:
    """Where our server's milliseconds go. What is no stage of a worker is the master's: HTTP, JSON, base64."""
    names = list(next(iter(spent.values())))
    rows = ([picture, *(show(spread(told[name]), "{:.1f}") for name in names)] for picture, told in spent.items())
    return table("One request of ours alone, ms", ["picture", *names], rows)


def draw(found: Found) -> None:
    figure, axes = plot().subplots(2, len(found), figsize=(2.6 * len(found), 5.2), layout="constrained", squeeze=False)
    for column, (case, told) in zip(axes.T, found.items(), strict=True):
        for axis, what, form in ((column[0], "rate", "{:.1f}"), (column[1], "server_ms", "{:.0f}")):
            medians = [spread(getattr(m, what) for m in told[name])["median"] for name in told]
            bars = axis.bar(list(told), medians, color=[COLOURS[name] for name in told])
            axis.bar_label(bars, [form.format(value) for value in medians], fontsize=8)
            axis.set_xticks(range(len(told)), list(told), rotation=20, fontsize=8)
        column[0].set_title(f"{case} connections", fontsize=9, loc="left")
    axes[0][0].set_ylabel("requests per second", fontsize=8)
    axes[1][0].set_ylabel("CPU ms per request, network taken out", fontsize=8)
    figure.suptitle("W3: IOPaint's /api/v1/inpaint, the same network on both", fontsize=10)
    save(figure, "inpaint")


def earlier() -> tuple[Found, Spent]:
    """What was measured the last time."""
    file = RESULTS / "inpaint.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rounds": {}}
    found = {
        case: {name: [Measured(*one) for one in rounds] for name, rounds in by_name.items()}
        for case, by_name in told["rounds"].items()
    }
    return found, told.get("stages", {})


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--add", action="store_true", help="to the rounds of the last time")
    arguments.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    arguments.add_argument("--connections", type=int, nargs="+", choices=REQUESTS, default=list(REQUESTS))
    arguments.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    given = arguments.parse_args()
    facts, (found, spent) = machine_facts(PACKAGES), earlier() if given.add else ({}, {})
    pictures = {picture: PICTURES[picture]() for picture in given.pictures}
    rounds, sizes = 1 if given.quick else given.runs, {}
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("", total=rounds * len(given.networks) * len(COLOURS) * len(pictures))
        step = lambda told: progress.update(task, description=told, advance=1)  # noqa: E731
        for _ in range(rounds):
            for network in given.networks:
                cases = {picture + (HEAVY if network == "LaMa" else ""): case for picture, case in pictures.items()}
                with weights(*NETWORKS[network]) as (cache, sizes[network]):
                    one_round(found, spent, cases, given, cache, step)
    reached, shown = goals(found), [*tables(found), *([stages(spent)] if spent else [])]
    print_tables(shown, reached)
    most = max(len(one) for told in found.values() for one in told.values())
    told = ", ".join(f"{network}: {size:,}" for network, size in sizes.items())
    write_result("inpaint", facts, {
        "about": f"W3: IOPaint's /api/v1/inpaint with the same TorchScript network on both ({told} weights)",
        "runs": most, "requests": REQUESTS, "peers": {STOCK: "iopaint==1.6.0"}, "goals": reached, "tables": shown,
        "rounds": found, "stages": spent,
    })  # fmt: skip
    draw(found)


if __name__ == "__main__":
    main()
