"""Builds an engine from settings: the one list of what belongs together. Nothing is started here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from core import VERSION
from core.model import Catalogue, ModelSpec
from core.settings import Settings
from core.signing import Signer
from engine.engine import Engine
from engine.keeper import Keeper
from engine.metrics import Metrics
from scheduler.admission import Admission
from scheduler.config import SchedulerConfig
from scheduler.scheduler import Scheduler
from store import secret
from store.files import FileStore
from store.lock import FolderLock
from store.loras import StoredLoras
from store.modes import open_to_others, tighten_all
from store.names import TEMPORARY
from store.recovery import open_jobs
from store.saved import SAVED, SavedImages
from workers.arena import Arena
from workers.contract import WorkerPool
from workers.devices import DevicePlan, available_cores, list_gpus, plan, unused
from workers.monitor import Monitor
from workers.pool import Pool, PoolConfig
from workers.supervisor import SupervisorConfig

log = structlog.get_logger("engine")
LORAS = "loras"
BUILT_IN = Path(__file__).resolve().parent.parent / "models" / "repository"
PoolMaker = Callable[[Sequence[DevicePlan], Catalogue, Arena], WorkerPool]


def read_catalogue(settings: Settings) -> Catalogue:
    """The models on offer. One whose weights are missing is not, and the log says so. Raises ValueError with a sentence
    when a model file is wrong, their folder is missing, or a model that was asked for by name lacks its weights."""
    more = settings.models_folder
    if more is not None and not more.is_dir():
        raise ValueError(f"--models-folder {more} is no folder; name the one that holds the model files")
    offered = []
    for spec in Catalogue.read([BUILT_IN, *([more] if more else [])], settings.models):
        lacking = spec.lacks()
        if lacking is None:
            offered.append(_bounded(_with_loras(spec.with_weights(), settings), settings))
        elif spec.name in settings.models:
            raise ValueError(f"model '{spec.name}' cannot be offered: {lacking}")
        else:
            log.info("model not offered", model=spec.name, why=lacking)
    return Catalogue(offered)


def lora_folder(settings: Settings) -> Path:
    """Where uploaded LoRAs lie."""
    return settings.lora_folder or settings.outputs / LORAS


def temporary_folder(settings: Settings) -> Path:
    """Where files lie while they are written; a start sweeps it."""
    return (settings.outputs / TEMPORARY).resolve()


def _with_loras(spec: ModelSpec, settings: Settings) -> ModelSpec:
    """A model whose requests may name LoRAs, with the folder of those that are uploaded, unless it has its own."""
    if "lora_name" not in spec.params or "lora_folder" in spec.options:
        return spec
    return replace(spec, options={**spec.options, "lora_folder": str(lora_folder(settings).resolve())})


def _bounded(spec: ModelSpec, settings: Settings) -> ModelSpec:
    return replace(spec, max_output_pixels=min(spec.max_output_pixels, settings.max_output_pixels))


def plan_devices(settings: Settings) -> list[DevicePlan]:
    """The workers to run. Raises ValueError with a sentence when the setting asks for what is not there."""
    visible, gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), list_gpus()
    if why := unused(settings.devices, visible, gpus):
        log.warning(f"CPUS SERVE, AND NO GPU: {why}; mend that, or set --devices cuda to be refused without one")
    return plan(settings.devices, visible, gpus, available_cores(), threads=settings.threads)


def build(settings: Settings, make_pool: PoolMaker | None = None) -> Engine:
    """An engine, ready to be started. `make_pool` replaces the real pool (tests). Raises ValueError or StorageFailed
    with a sentence that says what to mend."""
    catalogue = read_catalogue(settings)
    plans = plan_devices(settings)
    lock = FolderLock(settings.outputs)
    for folder in (settings.outputs / SAVED, settings.outputs / LORAS):  # as an older server left them
        tighten_all(folder)
    if open_to_others(settings.outputs):
        log.warning("other users of this host may look into the outputs folder, whose rights cannot be changed")
    files = FileStore(settings.outputs, min_free=settings.min_free_disk)
    jobs, found = open_jobs(files)
    metrics = Metrics(version=VERSION)
    try:
        arena = Arena(settings.arena_bytes)
    except OSError as fault:
        raise ValueError(f"arena_bytes: so much address space cannot be had ({fault.strerror}); set less") from None
    signer = None  # where nobody needs a key, addresses need no signature
    if settings.keys_file is not None:
        signer = Signer(secret.read(settings.url_secret) if settings.url_secret else secret.kept(settings.outputs))
    pool = make_pool(plans, catalogue, arena) if make_pool else real_pool(settings, plans, catalogue, arena)
    return Engine(
        settings=settings,
        catalogue=catalogue,
        scheduler=Scheduler(SchedulerConfig(
            max_queue_delay=settings.max_queue_delay, hang_floor=settings.hang_floor,
            quiet_floor=settings.hang_floor / 3, seats=settings.seats, load_timeout=settings.boot_timeout,
            longest_batch=settings.longest_batch,
        )),
        admission=Admission(
            settings.queue_jobs, settings.queue_bytes, tenant_share=settings.tenant_share, clock=time.monotonic
        ),
        pool=pool,
        arena=arena,
        keeper=Keeper(lock, jobs, files, settings.retention_age, settings.retention_bytes, found, metrics.stored),
        metrics=metrics,
        monitor=None if make_pool else Monitor(plans),
        saved=SavedImages(files, settings.iopaint_saved) if settings.iopaint_saved else None,
        loras=StoredLoras(
            lora_folder(settings), settings.lora_max, most=settings.lora_files, most_bytes=settings.lora_bytes,
            min_free=settings.min_free_disk,
        ),
        signer=signer,
    )


def real_pool(settings: Settings, plans: Sequence[DevicePlan], catalogue: Catalogue, arena: Arena) -> Pool:
    """Processes, one per device."""
    config = PoolConfig(
        root=str(settings.outputs.resolve()),
        codec_threads=settings.codec_threads,
        warm_up=settings.warm_up,
        log_level=settings.log_level,
        loaded_models=settings.loaded_models,
        capture=settings.log_format == "json",
        models_folder=str(settings.models_folder or ""),
        ping_interval=settings.ping_interval,
        supervisor=SupervisorConfig(
            boot_timeout=settings.boot_timeout,
            backoff=settings.restart_backoff,
            backoff_max=settings.restart_backoff_max,
            give_up_after=settings.give_up_after,
        ),
    )
    return Pool(plans, list(catalogue), arena, config)
