"""`python server.py doctor`: looks whether this machine can serve with these settings, and says what to do where not.

One line per finding: a tick for what is right, ! for what will cost something, a cross for what stops the server. torch
and the codecs are tried in processes of their own, as the workers will use them.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

from core.model import Catalogue
from core.names import is_loopback
from core.settings import Settings
from core.units import show_size
from workers.devices import DevicePlan, available_cores, list_gpus, plan

ROOT = Path(__file__).resolve().parent.parent
WORKER_BYTES = 450 << 20
FEW_FILES, ENOUGH_FILES = 512, 4096

TORCH_PROBE = """
import json, torch
found = torch.cuda.is_available()
devices = torch.cuda.device_count() if found else 0
if devices:
    torch.ones(8, device="cuda").sum().item()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}))
"""

ADAPTER_PROBE = """
import sys
from models.classes import tell_faults
tell_faults(*sys.argv[1:])
"""

CODEC_PROBE = """
import json, numpy
from core.header import read_header
from workers import codecs
pixels = numpy.tile(numpy.arange(64, dtype=numpy.uint8)[:, None, None], (1, 64, 3))
faults = {}
for kind in ("png", "jpeg", "webp", "avif"):
    try:
        data = bytes(codecs.encode(pixels, kind))
        back = codecs.decode(data, read_header(data)).image
        assert back.shape == pixels.shape and abs(back.astype(int) - pixels).mean() < 8
    except Exception as fault:
        faults[kind] = f"{type(fault).__name__}: {fault}"[:200]
print(json.dumps(faults))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: how it is, what was found, and what to do about it."""

    mark: Literal["✓", "!", "✗"]
    what: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.mark} {self.what}" + (f"\n    → {self.advice}" if self.advice else "")


Check = Callable[[Settings], Iterator[Finding]]


def run(settings: Settings, more: Sequence[Check] = ()) -> int:
    """Print every finding as it is made, also those of further checks. 1 when something stops the server, else 0."""
    found: list[Finding] = []
    for check in (*CHECKS, *more):
        for finding in _safely(check, settings):
            print(finding, flush=True)
            found.append(finding)
    crosses = sum(finding.mark == "✗" for finding in found)
    warnings = sum(finding.mark == "!" for finding in found)
    if crosses:
        print(f"\n{crosses} of {len(found)} checks stop the server.")
    else:
        print("\nThe server can start" + (f"; {warnings} to look at." if warnings else "."))
    return 1 if crosses else 0


def _safely(check: Check, settings: Settings) -> Iterator[Finding]:
    try:
        yield from check(settings)
    except Exception as fault:
        yield Finding("✗", f"the check of the {check.__name__} broke: {type(fault).__name__}: {fault}")


def python(_: Settings) -> Iterator[Finding]:
    yield Finding("✓", f"Python {platform.python_version()} on {platform.system()}, {available_cores()} cores")


def packages(_: Settings) -> Iterator[Finding]:
    missing, other = [], []
    pins = [line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    for name, wanted in pins:
        try:
            have = metadata.version(name.partition("[")[0])
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if have.partition("+")[0] != wanted.strip():
            other.append(f"{name} {have} instead of {wanted.strip()}")
    if missing:
        yield Finding("✗", f"packages missing: {', '.join(missing)}", "pip install -r requirements.txt")
    if other:
        yield Finding("!", f"other versions than tested: {', '.join(other)}", "pip install -r requirements.txt")
    if not missing and not other:
        yield Finding("✓", f"{len(pins)} packages, in the versions that were tested")


def devices(settings: Settings) -> Iterator[Finding]:
    """The plan of workers, and whether torch sees the GPUs of it."""
    gpus, visible = list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        plans = plan(settings.devices, visible, gpus, available_cores(), settings.threads)
    except ValueError as fault:
        yield Finding("✗", str(fault), "change --devices, or mend the driver (nvidia-smi must list the GPU)")
        return
    for item in plans:
        room = f", {show_size(item.memory_total)}" if item.memory_total else ""
        threads = f", {item.threads} thread{'s' * (item.threads > 1)}" if item.kind == "cpu" else ""
        yield Finding("✓", f"worker {item.worker}: {item.name}{room}{threads}")
    yield from _torch(plans, bool(gpus))
    free = psutil.virtual_memory().available
    if free < len(plans) * WORKER_BYTES:
        yield Finding("!", f"{_mib(free)} of memory for {len(plans)} workers", "take fewer (--devices)")


def _torch(plans: list[DevicePlan], nvml: bool) -> Iterator[Finding]:
    wanted = next((item for item in plans if item.kind == "cuda"), None)
    told = _probe(TORCH_PROBE, {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted.visible})
    if isinstance(told, str):
        yield Finding("✗", f"torch does not run: {told}", "pip install -r requirements.txt")
    elif wanted and not told["devices"]:
        why = f"for CUDA {told['cuda']} sees no GPU" if told["cuda"] else "is built without CUDA"
        yield Finding("✗", f"torch {told['version']} {why}", "install a torch for this driver, or use --devices cpu")
    elif told["devices"] and not nvml:
        yield Finding(
            "!", "torch sees a GPU that the driver's NVML does not list, so it is not used",
            "in a container, add 'utility' to NVIDIA_DRIVER_CAPABILITIES",
        )  # fmt: skip
    else:
        yield Finding("✓", f"torch {told['version']}" + (" runs on the GPU" if wanted else ""))


def codecs(_: Settings) -> Iterator[Finding]:
    faults = _probe(CODEC_PROBE)
    if isinstance(faults, str):
        yield Finding("✗", f"the image codecs do not load: {faults}", "pip install -r requirements.txt")
        return
    for kind, why in faults.items():
        yield Finding("✗", f"{kind} cannot be read and written: {why}", "pip install -r requirements.txt")
    if not faults:
        yield Finding("✓", "PNG, JPEG, WebP and AVIF are read and written")


def memory(settings: Settings) -> Iterator[Finding]:
    """The shared memory that images travel in: an anonymous file of the arena's size, taken only as it is used."""
    try:
        fd = os.memfd_create("imagepool-doctor")
        try:
            os.ftruncate(fd, settings.arena_bytes)
            with mmap.mmap(fd, settings.arena_bytes) as shared:
                shared[-1] = 1
        finally:
            os.close(fd)
    except (OSError, AttributeError) as fault:
        yield Finding("✗", f"no shared memory of {show_size(settings.arena_bytes)}: {fault}", "lower --arena-bytes")
        return
    yield Finding("✓", f"shared memory of {show_size(settings.arena_bytes)} can be mapped")
    free = psutil.virtual_memory().available
    if settings.queue_bytes > free:
        yield Finding("!", f"--queue-bytes {show_size(settings.queue_bytes)} is more than the free memory", "lower it")


def storage(settings: Settings) -> Iterator[Finding]:
    folder = settings.outputs.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as fault:
        yield Finding("✗", f"{folder} cannot be written: {fault.strerror}", "give it to this user, or set --outputs")
        return
    free = shutil.disk_usage(folder).free
    room = f"{_mib(free)} free for {settings.outputs}"
    if free < settings.min_free_disk:
        yield Finding("✗", f"{room}, less than --min-free-disk", "make room, or lower --min-free-disk")
    elif free < settings.min_free_disk + settings.retention_bytes:
        yield Finding("!", f"{room}, less than --retention-bytes may take", "make room, or lower --retention-bytes")
    else:
        yield Finding("✓", f"{room}, and it can be written")


def port(settings: Settings) -> Iterator[Finding]:
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.listen_host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as fault:
        yield Finding(
            "✗", f"port {settings.port} of {settings.listen_host} cannot be taken: {fault.strerror}",
            "stop who has it (perhaps a server that runs), or set --port",
        )  # fmt: skip
        return
    yield Finding("✓", f"port {settings.port} of {settings.listen_host} is free")


def files(_: Settings) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} open files allowed"
    if soft < ENOUGH_FILES:
        advice = f"ulimit -n {min(65_536, hard) if hard > 0 else 65_536} before the start"
        yield Finding("✗" if soft < FEW_FILES else "!", f"{text}; each connection takes one", advice)
    else:
        yield Finding("✓", text)


def models(settings: Settings) -> Iterator[Finding]:
    folders = [ROOT / "models" / "repository", *([settings.models_folder] if settings.models_folder else [])]
    if not folders[-1].is_dir():
        yield Finding("✗", f"--models-folder {folders[-1]} is no folder", "name the one that holds the model files")
        return
    try:
        catalogue = Catalogue.read(folders, settings.models)
    except (ValueError, TypeError, OSError) as fault:
        yield Finding("✗", str(fault), "mend the model file, or name other models with --models")
        return
    if not len(catalogue):
        yield Finding("✗", "there is no model to serve", "set --models-folder to a folder of model files")
        return
    yield Finding("✓", f"{len(catalogue)} models: {', '.join(spec.name for spec in catalogue)}")
    for spec in catalogue:
        if lacking := spec.lacks():
            yield Finding("!", f"model '{spec.name}' is not offered", lacking)
        for name, value in spec.options.items():
            if _is_weights(value) and not os.access(value, os.R_OK):
                yield Finding("✗", f"model '{spec.name}': {name} = {value} cannot be read", "bring the file")


def adapters(settings: Settings) -> Iterator[Finding]:
    """Whether the classes of one's own models can be imported, as a worker would."""
    folder = settings.models_folder
    try:
        own = Catalogue.read([folder] if folder else [])
    except ValueError:  # told by the check of the models
        return
    wanted = {spec.name: spec.adapter for spec in own if not settings.models or spec.name in settings.models}
    faults = _probe(ADAPTER_PROBE, None, [str(folder and folder.resolve()), *wanted.values()]) if wanted else {}
    if isinstance(faults, str):
        yield Finding("✗", f"the models of {folder} cannot be tried: {faults}", "mend their modules")
        return
    lost = {name: faults[adapter] for name, adapter in wanted.items() if adapter in faults}
    for name, why in lost.items():
        yield Finding("✗", f"model '{name}' cannot be loaded: {why}", "mend it; docs/models.md shows a whole one")
    if wanted and not lost:
        yield Finding("✓", f"{len(wanted)} models of {folder} can be imported")


def named(settings: Settings) -> Iterator[Finding]:
    """Files and folders that settings name and that are asked for only when somebody comes for them."""
    if settings.lora_folder is not None and settings.lora_folder.exists() and not settings.lora_folder.is_dir():
        yield Finding("✗", f"--lora-folder {settings.lora_folder} is no folder", "name another one, or none")
    shown = settings.iopaint_input
    if shown is not None and not (shown.is_file() and os.access(shown, os.R_OK)):
        yield Finding("!", f"--iopaint-input {shown} cannot be read: IOPaint's page opens empty", "name an image")


def keys(settings: Settings) -> Iterator[Finding]:
    if settings.keys_file is None:
        host = settings.listen_host
        if host == "localhost" or is_loopback(host):
            yield Finding("✓", f"no keys file: this host alone may use the server, at {host}")
        else:
            yield Finding("!", f"no keys file: whoever reaches {host} may use the server", "set --keys-file")
        return
    try:
        tomllib.loads(settings.keys_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        yield Finding("✗", f"the keys file cannot be read: {fault}", "mend it; docs/api.md shows one")
        return
    yield Finding("✓", "the keys file can be read")


CHECKS: tuple[Check, ...] = (
    python, packages, devices, codecs, memory, storage, port, files, models, adapters, named, keys,
)  # fmt: skip


def _mib(size: int) -> str:
    return f"{size / (1 << 30):.1f}GiB" if size >= 1 << 30 else f"{size >> 20}MiB"


def _is_weights(value: Any) -> bool:
    return isinstance(value, str) and Path(value).suffix in (".pt", ".pth", ".safetensors", ".onnx", ".bin", ".ckpt")


def _probe(script: str, environ: dict[str, str] | None = None, arguments: Sequence[str] = ()) -> Any:
    """What the script printed as JSON, or a sentence when it did not come so far."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=ROOT, env={**os.environ, **(environ or {})},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "no answer within two minutes"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"it exited with {done.returncode}"])[-1][:300]
    return json.loads(done.stdout.strip().splitlines()[-1])
