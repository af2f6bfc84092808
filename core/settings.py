"""Every setting of the server: its type, default, range and a sentence about it. Read once, at the edge, frozen.

The sources, lowest to highest: the defaults here, a TOML file (`--config`), the environment (`IMAGEPOOL_PORT`, ...),
flags (`--port`, ...). A name or a value that cannot be read stops the start with one sentence.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from core import flags
from core.names import HostNames, PublicUrl
from core.units import Caps, Count, Duration, Form, Networks, Size, Words, read_size, show_size

PREFIX = "IMAGEPOOL_"
MIB, GIB, DAY = 1 << 20, 1 << 30, 86_400.0
THIS_HOST, EVERYWHERE = "127.0.0.1", "0.0.0.0"


class Tier(BaseModel):
    """What one kind of client may ask for. None: unlimited. In one word: minute/hour/day/file, "5/20/50/2MiB"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_minute: Count | None = Field(default=None, ge=1)
    per_hour: Count | None = Field(default=None, ge=1)
    per_day: Count | None = Field(default=None, ge=1)
    max_file: Annotated[int | None, BeforeValidator(lambda size: None if size is None else read_size(size))] = None

    def __str__(self) -> str:
        size = None if self.max_file is None else show_size(self.max_file)
        parts = (self.per_minute, self.per_hour, self.per_day, size)
        return "/".join("-" if part is None else str(part) for part in parts)


TIERS: Mapping[str, Tier] = {
    "anonymous": Tier(per_minute=5, per_hour=20, per_day=50, max_file=2 * MIB),
    "free": Tier(per_minute=10, per_hour=100, per_day=500, max_file=5 * MIB),
    "pro": Tier(per_minute=60, per_hour=1_000, per_day=10_000, max_file=25 * MIB),
    "enterprise": Tier(per_minute=300, per_hour=10_000, per_day=100_000, max_file=100 * MIB),
}


def _read_tiers(value: Any) -> Any:
    if isinstance(value, str):
        value = dict(word.partition("=")[::2] for word in value.replace(",", " ").split())
    return {name: _read_tier(tier) for name, tier in value.items()} if isinstance(value, Mapping) else value


def _read_tier(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parts = [None if part in ("", "-") else part for part in value.split("/")]
    if len(parts) != 4:
        raise ValueError("should be name=minute/hour/day/file such as free=10/100/500/5MiB ('-' for no limit)")
    return dict(zip(("per_minute", "per_hour", "per_day", "max_file"), parts, strict=True))


def _show_tiers(tiers: Mapping[str, Tier]) -> str:
    return ",".join(f"{name}={tier}" for name, tier in tiers.items())


Tiers = Annotated[dict[str, Tier], BeforeValidator(_read_tiers), Form("NAME=M/H/D/FILE,..", _show_tiers)]


def setting(group: str, default: Any, about: str, **limits: Any) -> Any:
    """A field with the group it is listed under and its sentence."""
    return Field(default, description=about, json_schema_extra={"group": group}, validate_default=True, **limits)


class Settings(BaseSettings):
    """The settings of one server. Sizes are bytes, durations seconds, whatever way they were written."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True, enable_decoding=False, title="ImagePool"
    )

    # fmt: off
    host: str = setting(
        "Network", "", "Address to listen on (none named: 127.0.0.1 without a keys file, 0.0.0.0 with one).")
    port: Count = setting("Network", 8000, "TCP port to listen on (0: any free one).", ge=0, le=65_535)
    config: Path | None = setting("Network", None, "TOML file with settings; environment and flags go over it.")
    dialects: Words = setting(
        "Network", (),
        "Serve only these APIs of jobs, i2ii, imagen, iopaint, lama_gateway, openai, imagegenx, lora (none: all).")
    docs: bool = setting("Network", True, "Serve the interactive API description at /docs.")
    public_url: PublicUrl = setting(
        "Network", "", "Address that clients know this server by, such as https://images.example.com, for its links.")
    allowed_hosts: HostNames = setting(
        "Network", (), "Further host names that it answers to without a keys file (*.example.com, *: any).")
    cors_origins: Words = setting("Network", (), "Web origins that browsers may call from (none named: only our own).")
    max_body: Size = setting("Network", 64 * MIB, "Largest request body.", ge=1024)
    max_pixels: Count = setting("Network", 25_000_000, "Most pixels of an input image, read from its header.", ge=1)
    max_output_pixels: Count = setting(
        "Network", 100_000_000, "Most pixels of a result, told from the request; a model's file may say less.", ge=1)
    header_timeout: Duration = setting("Network", 10.0, "How long a client may take to send its headers.", gt=0)
    body_timeout: Duration = setting(
        "Network", 10.0, "Within each such time a client must send, or read, 1 KiB per second on average.", gt=0)
    body_bytes: Size = setting(
        "Network", 1 * GIB, "Most bytes of request bodies and large answers on their way at once.", ge=MIB)
    address_share: float = setting(
        "Network", 0.5, "Largest part of these that one address (IPv6: one /64) may have.", gt=0, le=1)
    max_connections: Count = setting(
        "Network", 8192, "Most open connections; fewer where the limit on open files does not allow them.", ge=1)
    connections_per_address: Count = setting(
        "Network", 4096,
        "Most of them (never over half) of one IPv4 address or IPv6 /64, and its requests through a proxy.", ge=1)
    new_connections: Count = setting(
        "Network", 500, "Most connections a second that one such address opens, proxies left out (0: any).", ge=0)
    trusted_proxies: Networks = setting(
        "Network", (), "Networks of proxies whose X-Forwarded-For or Forwarded is believed (none: nobody's).")
    fetch: Literal["off", "public", "any"] = setting(
        "Network", "public", "Hosts asked for images and told of ends: none, those of the open internet, or any.")
    request_timeout: Duration = setting("Network", 600.0, "Longest that one request waits for its image.", gt=0)
    keys_file: Path | None = setting("Network", None, "TOML file of API keys; without one the server is open to all.")
    tiers: Tiers = setting(
        "Network", {}, "Limits by tier, over the presets; without a keys file the anonymous tier has none.")
    url_lifetime: Duration = setting(
        "Network", 3600.0, "With keys: how long an answered address of an image serves without one.", gt=0)
    url_secret: Path | None = setting(
        "Network", None, "File with the secret that signs such addresses (none: made once, kept in outputs).")

    devices: str = setting("Devices", "auto", "auto, cuda, cuda:0,cuda:2, cpu, cpu:4 (four workers) or a mixture.")
    threads: Count = setting("Devices", 0, "Compute threads of each CPU worker (0: share the cores).", ge=0, le=1024)
    codec_threads: Count = setting("Devices", 2, "Threads of each worker that decode and encode images.", ge=1, le=64)
    warm_up: bool = setting("Devices", True, "Run each model once before its worker says it is ready.")
    seats: Count = setting("Devices", 32, "Most jobs that a device runs at once, step by step.", ge=1, le=1024)
    arena_bytes: Size = setting("Devices", 16 * GIB, "Address space of the shared image memory, taken as used.", ge=MIB)

    models: Words = setting("Models", (), "Serve only these models (none named: all).")
    loaded_models: Count = setting(
        "Models", 0, "Most models that a worker keeps loaded beside those with `preload` (0: any number).", ge=0)
    models_folder: Path | None = setting("Models", None, "Folder of further model files; they go over built-in ones.")
    edit_model: str = setting(
        "Models", "", "Model of i2ii's /edit (none named: the first diffusion model that edits, else `edit`).")
    imagen_models: Words = setting(
        "Models", (), "Diffusion models behind imagen's routes: enhance=NAME,style_comic=NAME,style_aged=NAME.")
    imagegenx_model: str = setting(
        "Models", "", "Model of ImageGenX's API for requests without a model_type (none named: the first that fits).")
    openai_model: str = setting(
        "Models", "", "Model of OpenAI's API for requests that name none of ours (none named: the first that fits).")
    lora_folder: Path | None = setting("Models", None, "Folder of LoRAs, .safetensors files (default: outputs/loras).")
    lora_max: Size = setting("Models", 2 * GIB, "Largest LoRA that may be uploaded (0: none may).", ge=0)
    lora_bytes: Size = setting("Models", 20 * GIB, "No LoRA is taken beyond this total of their folder.", ge=0)
    lora_files: Count = setting("Models", 1000, "No LoRA is taken when their folder has so many files.", ge=1)
    resolution_caps: Caps = setting(
        "Models", ((512, 16), (1024, 8), (2048, 2)), "Most images of a batch, by the side of a square; beyond: one.")

    iopaint_port: Count = setting("IOPaint", 0, "Further port, with IOPaint's own page at / (0: none).", ge=0, le=65535)
    iopaint_quality: Count = setting("IOPaint", 100, "Quality of its JPEG, WebP and AVIF answers.", ge=1, le=100)
    iopaint_input: Path | None = setting("IOPaint", None, "Image that its page opens at the start.")
    iopaint_saved: Size = setting(
        "IOPaint", 1 * GIB, "Most bytes that its users may save under outputs/saved (0: none).", ge=0)

    max_queue_delay: Duration = setting("Queue", 0.05, "Longest wait for a fuller batch.", ge=0)
    longest_batch: Duration = setting(
        "Queue", 0.0, "Longest batch of several images, as learned (0: 10 s, or 2 s while other groups wait).", ge=0)
    queue_jobs: Count = setting("Queue", 10_000, "Most jobs that may be in the server, waiting or running.", ge=1)
    queue_bytes: Size = setting("Queue", 2 * GIB, "Most bytes of images that those jobs may hold.", ge=MIB)
    tenant_share: float = setting(
        "Queue", 1.0, "Largest part of the queue, and of body_bytes, that one tenant may fill.", gt=0, le=1)

    boot_timeout: Duration = setting("Workers", 600.0, "How long each part of a worker's boot may take.", gt=0)
    hang_floor: Duration = setting("Workers", 30.0, "A batch may show no sign of life for at least so long.", gt=0)
    ping_interval: Duration = setting("Workers", 2.0, "How often an idle worker is asked for a sign of life.", gt=0)
    restart_backoff: Duration = setting("Workers", 0.5, "Pause before the first restart of a worker; it doubles.", gt=0)
    restart_backoff_max: Duration = setting("Workers", 30.0, "Longest pause before a restart.", gt=0)
    give_up_after: Count = setting("Workers", 5, "Boot failures in a row after which a device is given up.", ge=1)
    drain_delay: Duration = setting(
        "Workers", 0.0, "How long, at shutdown, readiness says no while all is still served.", ge=0)
    shutdown_grace: Duration = setting("Workers", 15.0, "How long running batches may finish at shutdown.", ge=0)

    outputs: Path = setting("Storage", Path("outputs"), "Folder of the job database, inputs and results.")
    retention_age: Duration = setting("Storage", 7 * DAY, "Ended jobs and their images are removed after this.", gt=0)
    retention_bytes: Size = setting("Storage", 20 * GIB, "Oldest results are removed beyond this total.", ge=0)
    min_free_disk: Size = setting("Storage", 512 * MIB, "No new job is taken with less room left on the disk.", ge=0)

    log_level: Literal["debug", "info", "warning", "error"] = setting("Log", "info", "Least severe line to write.")
    access_log: Literal["off", "errors", "all"] = setting(
        "Log", "errors", "Requests that have a line: none (off), those answered with 400 and above, or all.")
    log_format: Literal["console", "json"] = setting("Log", "console", "For people, or one JSON object a line.")
    # fmt: on

    @property
    def listen_host(self) -> str:
        """Where to listen: at `host` or, when none is named, for this host alone unless clients need a key."""
        return self.host or (EVERYWHERE if self.keys_file else THIS_HOST)

    @classmethod
    def load(cls, argv: Sequence[str]) -> Settings:
        """The settings from all sources. Prints one sentence and exits with 2 when one cannot be read; `--help` prints
        and exits with 0."""
        try:
            return cls.read(argv)
        except flags.BadSetting as fault:
            print(f"imagepool: {fault}", file=sys.stderr)
            raise SystemExit(2) from None

    @classmethod
    def read(cls, argv: Sequence[str]) -> Settings:
        """As `load`, but raises `BadSetting`."""
        given = flags.read(cls, argv, PREFIX)
        flags.check_environment(cls, os.environ, PREFIX)
        try:
            return cls(**given)
        except ValidationError as fault:
            raise flags.BadSetting(flags.explain(cls, fault, given, os.environ, PREFIX)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(init_settings, InitSettingsSource) and isinstance(env_settings, EnvSettingsSource)
        found = env_settings.env_vars
        links = flags.links(found, PREFIX)
        env_settings.env_vars = variables = {name: text for name, text in found.items() if name.upper() not in links}
        file = init_settings.init_kwargs.get("config") or variables.get(f"{PREFIX}config".lower())
        return init_settings, env_settings, InitSettingsSource(settings_cls, _read_file(file) if file else {})

    @field_validator("tiers")
    @classmethod
    def _complete_tiers(cls, given: dict[str, Tier], info: ValidationInfo) -> dict[str, Tier]:
        """Tiers not named keep their presets; with no keys to tell clients apart, strangers are not limited."""
        presets = dict(TIERS)
        if info.data.get("keys_file") is None:
            presets["anonymous"] = Tier()
        return {**presets, **given}


def _read_file(file: Path | str) -> dict[str, Any]:
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as fault:
        raise flags.BadSetting(f"the settings file {file} cannot be read: {fault.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise flags.BadSetting(f"the settings file {file} is not readable as TOML: {fault}") from None
    if "config" in found:
        raise flags.BadSetting(f"the settings file {file} names another one ('config'); only one is read")
    return found
