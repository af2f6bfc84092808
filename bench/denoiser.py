"""What a denoiser's step takes by rows, and what each setting for speed is worth: layout, compiler, graphs, eight bits.

    python -m bench.denoiser [--runs 5] [--steps 20] [--quick]

Random weights of real size on a GPU (Stable Diffusion 1.5, Qwen-Image with as many layers as fit), small ones on a CPU;
through the real stepper, one request for each row. Told are seconds of a step, its gain over the plain network in
float32 (CPU) or bfloat16 (GPU), the part of the time in which the GPU works, how often a step makes the host wait, what
the hub takes for a request and step, and what a thousand switches between two networks leave in the GPU's memory.
Writes bench/results/denoiser.json and denoiser.png on a GPU, denoiser_cpu.json and denoiser_cpu.png on a CPU.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench.common import machine_facts, write_result
from bench.denoiser_nets import Kind, denoise, kinds
from bench.hub import Widest
from bench.runs import parser, plot, print_tables, save, show, spread, table
from core.errors import ModelFailed
from models.diffusion import quantizing
from models.diffusion.memory import DeviceMemory
from models.stepping.compiled import CompiledForward
from models.stepping.contract import Lane
from models.stepping.merge import MergedNetwork
from models.stepping.stepper import StepEvents, Stepper

ROWS = (1, 2, 4, 8)
FEW_ROWS = (1, 4)  # on a CPU, where a compiler takes a minute for each
SWITCHES = 1_000
WARM = 3  # steps before those that are measured
COLOURS = ("#d1495b", "#30638e", "#9fb4c7", "#c9ada7", "#66a182", "#edae49", "#666666")


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a network."""

    name: str
    dtype: torch.dtype
    channels_last: bool = False
    compile: str = ""
    quantize: str = ""


@dataclass(slots=True)
class Told:
    """Of one network and setting, by rows, a value per round: seconds of a step, microseconds of the hub per request
    and step; once for the most rows: the GPU's busy share and the host's waits per step."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    hub: dict[int, list[float]] = field(default_factory=dict)
    busy: float | None = None
    waits: float | None = None
    prepared: float = 0.0  # seconds that the compiler took for all row sizes


def settings(device: torch.device, kind: Kind) -> list[Setting]:
    """The first is what the others are compared with."""
    if device.type == "cuda":
        plain = torch.bfloat16
        found = [Setting("bfloat16", plain), Setting("float32", torch.float32)]
    else:
        plain = torch.float32
        found = [Setting("float32", plain)]
    if kind.convolutions:
        found.append(Setting("channels_last", plain, channels_last=True))
    modes = ("default", "reduce-overhead") if device.type == "cuda" else ("default",)
    found += [Setting(f"compile, {mode}", plain, compile=mode) for mode in modes]
    try:
        quantizing.kind_of({"quantize": "int8"})
    except ModelFailed as missing:
        print(missing.message)
        return found
    found.append(Setting("int8", plain, quantize="int8"))
    if device.type == "cuda":
        found.append(Setting("int8, compile, default", plain, compile="default", quantize="int8"))
    return found


class Timed:
    """A network's forward, and the host's seconds in it."""

    def __init__(self, network: MergedNetwork) -> None:
        self.seconds = 0.0
        self._forward = network.forward
        network.forward = self.forward  # type: ignore[method-assign]

    def forward(self, calls: Sequence[Any]) -> list[Any]:
        began = time.perf_counter()
        try:
            return self._forward(calls)
        finally:
            self.seconds += time.perf_counter() - began


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """One network under one setting."""

    def __init__(
        self, kind: Kind, setting: Setting, device: torch.device, rows: Sequence[int], network: nn.Module
    ) -> None:
        self._kind, self._setting, self._device, self._rows = kind, setting, device, rows
        compiled = CompiledForward(kind.name, network, setting.compile) if setting.compile else None
        self._network = MergedNetwork(kind.name, network, Lane.DENOISE, "forward", rows if compiled else (), compiled)
        self.told = Told()
        if compiled:
            began = time.perf_counter()
            self._network.prepare(self._network.call((), self._given(0)), print)
            self.told.prepared = time.perf_counter() - began
            if not compiled.shapes:
                raise ModelFailed(f"{kind.name} could not be compiled")
        self._timed = Timed(self._network)

    def _given(self, seed: int) -> dict[str, Any]:
        return self._kind.inputs(seed, self._device, self._setting.dtype)

    def _stepper(self, rows: int, steps: int) -> Stepper:
        ended: dict[int, Any] = {}
        stepper = Stepper(self._device, Widest(), StepEvents(ended.__setitem__))  # type: ignore[arg-type]
        for number in range(rows):
            run = denoise(self._network, self._kind, self._given(number), steps)
            stepper.join(number, run, priority=2, remaining=steps, cancelled=lambda: False)
        for _ in range(WARM):
            stepper.advance()
        settle(self._device)
        return stepper

    def measure(self, rows: int, steps: int) -> None:
        """One round."""
        stepper = self._stepper(rows, steps + WARM)
        before, began = self._timed.seconds, time.perf_counter()
        waited = _Waits(stepper)
        for _ in range(steps):
            stepper.advance()
        settle(self._device)
        whole = time.perf_counter() - began
        # What the host does beside enqueueing the forward and waiting for the device to come so far.
        host = waited.ended - began - (self._timed.seconds - before) - waited.seconds
        self.told.seconds.setdefault(rows, []).append(whole / steps)
        self.told.hub.setdefault(rows, []).append(host / steps / rows * 1e6)

    def look(self, rows: int, steps: int) -> None:
        """On a GPU: how busy it is, and what makes the host wait."""
        if self._device.type != "cuda":
            return
        stepper = self._stepper(rows, steps + WARM)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(steps):
                    stepper.advance()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.told.waits = sum("synchroniz" in str(one.message).lower() for one in said) / steps
        stepper = self._stepper(rows, steps + WARM)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            began = time.perf_counter()
            for _ in range(steps):
                stepper.advance()
            settle(self._device)
            whole = time.perf_counter() - began
        events = (event for event in seen.events() if "cuda" in str(event.device_type).lower())
        kernels = sum(event.self_device_time_total for event in events)
        self.told.busy = min(1.0, kernels / 1e6 / whole)


class _Waits:
    """The seconds in which the stepper waits for the device before the next forward, and when its last turn ended."""

    def __init__(self, stepper: Stepper) -> None:
        self.seconds, self.ended = 0.0, time.perf_counter()
        begin, advance = stepper._timer.begin, stepper.advance

        def waiting() -> None:
            began = time.perf_counter()
            begin()
            self.seconds += time.perf_counter() - began

        def turn() -> None:
            advance()
            self.ended = time.perf_counter()

        stepper._timer.begin = waiting  # type: ignore[method-assign]
        stepper.advance = turn  # type: ignore[method-assign]


def ready(kind: Kind, setting: Setting, device: torch.device) -> nn.Module:
    """The network as the setting wants it."""
    network = kind.make(device, setting.dtype)
    if setting.channels_last:
        network.to(memory_format=torch.channels_last)
    quantizing.quantize(setting.quantize, {"transformer": network})
    return network


def measure(kind: Kind, device: torch.device, runs: int, steps: int, rows: Sequence[int]) -> dict[str, Told]:
    """Every setting that the device bears. On a CPU they take turns, round by round; a GPU has room for one."""
    found: dict[str, Told] = {}
    benches: dict[str, Bench] = {}
    for setting in settings(device, kind):
        try:
            made = Bench(kind, setting, device, rows, ready(kind, setting, device))
            if device.type == "cuda":
                for _ in range(runs):
                    for count in rows:
                        made.measure(count, steps)
                made.look(rows[-1], steps)
            found[setting.name], benches[setting.name] = made.told, made
        except (torch.OutOfMemoryError, ModelFailed) as fault:
            print(f"{kind.name}, {setting.name}: left out: {str(fault).splitlines()[0]}")
        if device.type == "cuda":
            benches.clear()
            made = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()
    for _ in range(runs if benches else 0):
        for count in rows:
            for one in benches.values():
                one.measure(count, steps)
    return found


def switches(device: torch.device, count: int) -> dict[str, Any] | None:
    """Bytes that a switch between two networks leaves in a GPU's memory, which holds one of them at a time."""
    if device.type != "cuda":
        return None
    kind = kinds(device)[0]
    networks = [kind.make(torch.device("cpu"), torch.bfloat16) for _ in range(2)]
    size = sum(weight.numel() * weight.element_size() for weight in networks[0].parameters())
    memory, course = DeviceMemory(device, int(1.5 * size)), []
    for network in networks:
        memory.enter(network)
    given = kind.inputs(0, device, torch.bfloat16)
    began = time.perf_counter()
    for turn in range(count):
        network = networks[turn % 2]
        memory.bring(network)
        if turn % 10 == 9:
            network(**given)
            settle(device)
            course.append(torch.cuda.memory_allocated(device))
    seconds = (time.perf_counter() - began) / count
    kept = course[len(course) // 5:]  # the first ones fill caches
    mean = (len(kept) - 1) / 2
    slope = sum((at - mean) * value for at, value in enumerate(kept)) / sum((at - mean) ** 2 for at in range(len(kept)))
    return {"switches": count, "bytes_a_switch": slope / 10, "seconds_a_switch": seconds, "course": course}


def tables(found: dict[str, dict[str, Told]], moved: dict[str, Any] | None) -> list[dict[str, Any]]:
    shown = []
    for name, settings_ in found.items():
        rows = sorted(next(iter(settings_.values())).seconds)
        plain = next(iter(settings_.values()))
        shown.append(table(
            f"{name}: milliseconds of a step", ["setting", *(f"{count} rows" for count in rows), "gain",
                                                "hub, µs", "GPU busy", "waits a step", "compiled in"],
            ([setting, *(show(spread(value * 1e3 for value in told.seconds[count])) for count in rows),
              _gain(plain, told, rows[-1]), show(spread(told.hub[rows[-1]], 0), "{:.0f}"),
              "" if told.busy is None else f"{told.busy:.0%}", "" if told.waits is None else f"{told.waits:.1f}",
              f"{told.prepared:.0f} s" if told.prepared else ""] for setting, told in settings_.items()),
        ))
    if moved:
        shown.append(table("Two networks that do not fit together", ["switches", "left behind", "each takes"], [[
            f"{moved['switches']:,}", f"{moved['bytes_a_switch']:.0f} B/switch",
            f"{moved['seconds_a_switch'] * 1e3:.0f} ms",
        ]]))
    return shown  # fmt: skip


def _gain(plain: Told, told: Told, rows: int) -> str:
    """Against the plain network, round by round, at that many rows."""
    if plain is told:
        return ""
    pairs = zip(plain.seconds[rows], told.seconds[rows], strict=True)
    return show(spread(one / other for one, other in pairs), unit="x")


def draw(found: dict[str, dict[str, Told]], name: str) -> None:
    figure, axes = plot().subplots(1, len(found), figsize=(4.2 * len(found), 3.2), layout="constrained", squeeze=False)
    for axis, (network, settings_) in zip(axes[0], found.items(), strict=True):
        for colour, (setting, told) in zip(COLOURS, settings_.items(), strict=False):
            rows = sorted(told.seconds)
            axis.plot(rows, [statistics.median(told.seconds[count]) * 1e3 for count in rows], "o-", color=colour,
                      label=setting, markersize=3)  # fmt: skip
        axis.set_ylim(0)
        axis.set_title(network, fontsize=9, loc="left")
        axis.set_xlabel("rows of a forward", fontsize=8)
        axis.set_ylabel("milliseconds of a step", fontsize=8)
        axis.legend(fontsize=7)
    save(figure, name)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=20)
    given = arguments.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    runs, steps = (3, 5) if given.quick else (given.runs, given.steps)
    rows = ROWS if device.type == "cuda" else FEW_ROWS
    if device.type == "cpu":
        torch.set_num_threads(1)
    facts = machine_facts(("torch", "diffusers", "torchao"))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing is compiled already
        found = {kind.name: measure(kind, device, runs, steps, rows) for kind in kinds(device)}
        moved = switches(device, SWITCHES // 10 if given.quick else SWITCHES)
    shown = tables(found, moved)
    print_tables(shown)
    where = "of real size on a GPU" if device.type == "cuda" else "small, on one thread of a CPU"
    name = "denoiser" if device.type == "cuda" else "denoiser_cpu"
    write_result(name, facts, {
        "about": f"a denoiser's step with random weights, {where}, by rows and setting; gains at the most rows",
        "runs": runs, "steps": steps, "tables": shown, "switches": moved,
        "measured": {network: {setting: {"seconds": told.seconds, "hub_us": told.hub, "busy": told.busy,
                                         "waits": told.waits, "compiled_in": told.prepared}
                               for setting, told in settings_.items()} for network, settings_ in found.items()},
    })  # fmt: skip
    draw(found, name)


if __name__ == "__main__":
    main()
