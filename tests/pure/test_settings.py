"""Settings: four sources in their order, human units, and one sentence when a name or a value is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import flags, units
from core.flags import BadSetting
from core.settings import PREFIX, Settings, Tier

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    return str(file)


def test_defaults() -> None:
    settings = Settings.load([])
    assert (settings.listen_host, settings.port, settings.devices) == ("127.0.0.1", 8000, "auto")
    assert settings.outputs == Path("outputs")
    assert settings.max_body == 64 << 20 and settings.queue_bytes == 2 << 30 and settings.min_free_disk == 512 << 20
    assert settings.resolution_caps == ((512, 16), (1024, 8), (2048, 2))
    assert settings.retention_age == 7 * 86_400 and settings.max_queue_delay == 0.05
    assert settings.warm_up and settings.docs and settings.keys_file is None and settings.models == ()


@pytest.mark.parametrize(
    "flag",
    [
        "--public-url=images.example.com", "--public-url=ftp://images.example.com", "--public-url=https://",
        "--public-url=https://a.example/?x=1", "--public-url=https://u:p@a.example", "--public-url=https://a.example:0",
        "--public-url=https://a b.example", "--public-url=https://a.example:", "--allowed-hosts=http://imagepool",
        "--allowed-hosts=imagepool:8000", "--allowed-hosts=*.*.example.com", "--allowed-hosts=-a", "--allowed-hosts=a*",
    ],
)  # fmt: skip
def test_an_address_or_name_that_could_never_match_stops_the_start(flag: str) -> None:
    with pytest.raises(BadSetting, match=r"it should be (an address such as|host names without)"):
        Settings.read([flag])


def test_addresses_and_names_are_kept_as_browsers_write_them() -> None:
    settings = Settings.read(["--public-url", "https://Images.Example.com:443/Pool/", "--allowed-hosts", "ImagePool,*"])
    assert (settings.public_url, settings.allowed_hosts) == ("https://images.example.com/Pool", ("imagepool", "*"))
    assert Settings.read(["--public-url", "http://10.0.0.5:8000/"]).public_url == "http://10.0.0.5:8000"


def test_flags_go_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, 'port = 1\nqueue_jobs = 1\nthreads = 1\nhost = "file"')
    monkeypatch.setenv("IMAGEPOOL_PORT", "2")
    monkeypatch.setenv("IMAGEPOOL_QUEUE_JOBS", "2")
    settings = Settings.load(["--config", file, "--port", "3"])
    assert (settings.port, settings.queue_jobs, settings.threads, settings.codec_threads) == (3, 2, 1, 2)


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEPOOL_CONFIG", write(tmp_path, "port = 7"))
    assert Settings.load([]).port == 7


def test_every_setting_is_a_flag_and_can_be_given_its_own_default() -> None:
    for row in flags.rows(Settings):
        words = [row.flag] if not row.metavar else [row.flag, row.default] if row.default else []
        assert Settings.load(words) == Settings.load([]), row


def test_every_form_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEPOOL_MODELS", "lama, upscale")
    monkeypatch.setenv("IMAGEPOOL_RETENTION_BYTES", "1.5 GiB")
    monkeypatch.setenv("IMAGEPOOL_KEYS_FILE", "")
    settings = Settings.load(
        ["--resolution-caps", "512:4,1024:1", "--no-warm-up", "--retention-age=2h", "--max-queue-delay", "0",
         "--cors-origins", "https://a.example,https://b.example", "--hang-floor", "500ms", "--log-format", "json"]
    )  # fmt: skip
    assert settings.models == ("lama", "upscale") and settings.retention_bytes == 3 << 29 and settings.keys_file is None
    assert settings.resolution_caps == ((512, 4), (1024, 1)) and not settings.warm_up and settings.retention_age == 7200
    assert settings.max_queue_delay == 0 and settings.hang_floor == 0.5
    assert settings.cors_origins == ("https://a.example", "https://b.example")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load([]).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--prot", "1"], "no flag '--prot'; did you mean '--port'?"),
        (["--queue_jobs=1"], "no flag '--queue_jobs'; did you mean '--queue-jobs'?"),
        (["--por", "1"], "did you mean '--port'"),
        (["--max-bodies", "1"], "did you mean '--max-body'"),
        (["--port", "abc"], "--port is 'abc': it should be a whole number"),
        (["--port", "70000"], "--port is '70000': it should be less than or equal to 65535"),
        (["--port"], "expected one argument"),
        (["--max-body", "3Q"], "--max-body is '3Q': it should be a size such as 64MiB"),
        (["--max-body", "-1"], "--max-body is '-1': it should be a size"),
        (["--hang-floor", "1 fortnight"], "it should be a duration such as 50ms"),
        (["--hang-floor", "0"], "greater than 0"),
        (["--log-level", "loud"], "it should be 'debug', 'info', 'warning' or 'error'"),
        (["--resolution-caps", "1024:8,512:16"], "ascending sides"),
        (["--resolution-caps", "512"], "such as 512:16"),
        (["--tiers", "free=1/2"], "free=10/100/500/5MiB"),
        (["--tenant-share", "nan"], "--tenant-share is 'nan'"),
        (["extra"], "no flag 'extra'"),
        (["--config", "/nowhere/settings.toml"], "cannot be read: No such file"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_exit_2(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        Settings.load(argv)
    said = capsys.readouterr()
    assert stop.value.code == 2 and sentence in said.err and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quue_jobs = 1", "'quue_jobs' in the settings file is no setting; did you mean 'queue_jobs'?"),
        ("[tiers.free]\nper_minut = 1", "'tiers.free.per_minut' in the settings file is no setting; did you mean"),
        ('port = "many"', "'port' in the settings file is 'many'"),
        ("port = true", "'port' in the settings file is 'True'"),
        ("retention_age = inf", "should be a duration"),
        ("port = ", "not readable as TOML"),
        ('config = "other.toml"', "names another one"),
    ],
)
def test_a_wrong_file_is_told(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadSetting) as fault:
        Settings.read(["--config", write(tmp_path, text)])
    assert sentence in str(fault.value)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("IMAGEPOOL_PRT", "1", "IMAGEPOOL_PRT, which is no setting; did you mean 'IMAGEPOOL_PORT'?"),
        ("IMAGEPOOL_THREADS", "some", "IMAGEPOOL_THREADS is 'some'"),
        ("IMAGEPOOL_WARM_UP", "perhaps", "IMAGEPOOL_WARM_UP is 'perhaps'"),
    ],
)
def test_a_wrong_variable_is_told(name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSetting) as fault:
        Settings.read([])
    assert sentence in str(fault.value)


@pytest.mark.parametrize("service", ["IMAGEPOOL", "IMAGEPOOL_METRICS", "IMAGEPOOL_GRPC", "IMAGEPOOL_IOPAINT"])
@pytest.mark.parametrize("kind", ["TCP", "UDP", "SCTP"])
def test_what_kubernetes_tells_of_a_service_is_no_setting(
    service: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{kind.lower()}://10.0.0.7:8002"
    for name, value in {
        "SERVICE_HOST": "10.0.0.7",
        "SERVICE_PORT": "8002",
        "SERVICE_PORT_HTTP_ALT": "8002",
        "PORT": address,
        f"PORT_8002_{kind}": address,
        f"PORT_8002_{kind}_PROTO": kind.lower(),
        f"PORT_8002_{kind}_PORT": "8002",
        f"PORT_8002_{kind}_ADDR": "fd00::7",
    }.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    read = Settings.read([])
    assert (read.port, read.iopaint_port) == (8000, 0)


def test_what_docker_tells_of_a_linked_container_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NAME": "/web/imagepool-db", "PORT": "tcp://172.17.0.5:5432", "ENV_PASSWORD": "x"}.items():
        monkeypatch.setenv(f"IMAGEPOOL_DB_{name}", value)
    Settings.read([])


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("IMAGEPOOL_PORTS", "8000", "IMAGEPOOL_PORT"),
        ("IMAGEPOOL_METRICS_PORT", "8002", ""),
        ("IMAGEPOOL_SHUTDOWN_GRACES", "3s", "IMAGEPOOL_SHUTDOWN_GRACE"),
        ("IMAGEPOOL_ENV_PORT", "8000", ""),
        ("IMAGEPOOL_SERVICE_PORT", "http", ""),
        ("IMAGEPOOL_KEYS", "secret", ""),
    ],
)
def test_a_misspelt_variable_stops_the_start(
    name: str, value: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(flags.BadSetting, match=f"{name}, which is no setting.*{near}"):
        Settings.read([])


def test_variables_that_our_scripts_read_do_not_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = [*ROOT.glob("*.py"), *(ROOT / "bench").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    read = r"""environ(?:\.get\(|\[)["']IMAGEPOOL_(\w+)"""
    named = {name for file in scripts for name in re.findall(read, file.read_text("utf-8"))}
    assert "KEY" in named
    for name in named:
        monkeypatch.setenv(f"IMAGEPOOL_{name}", "1")
    Settings.read([])


def test_strangers_are_unlimited_until_there_are_keys(tmp_path: Path) -> None:
    assert Settings.read([]).tiers["anonymous"] == Tier()
    guarded = Settings.read(["--keys-file", "keys.toml"]).tiers
    assert guarded["anonymous"] == Tier(per_minute=5, per_hour=20, per_day=50, max_file=2 << 20)
    assert guarded["enterprise"].per_day == 100_000


def test_a_named_tier_replaces_its_preset_and_leaves_the_others(tmp_path: Path) -> None:
    flag = Settings.read(["--tiers", "free=1/-/3/5KB,gold=-/-/-/-"]).tiers
    assert flag["free"] == Tier(per_minute=1, per_day=3, max_file=5000) and flag["gold"] == Tier()
    assert flag["pro"].per_minute == 60
    file = Settings.read(["--config", write(tmp_path, '[tiers.anonymous]\nper_minute = 2\nmax_file = "1MiB"')]).tiers
    assert file["anonymous"] == Tier(per_minute=2, max_file=1 << 20)


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        Settings.load(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for row in flags.rows(Settings):
        assert row.flag in page and row.about in page and f"[{row.default}]" * bool(row.default) in page
        assert row.about.endswith(".") and row.group


def test_the_manual_holds_every_setting_as_it_is() -> None:
    manual = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert flags.table(Settings, PREFIX) in manual, "docs/configuration.md: put flags.table(Settings, PREFIX) into it"


def test_importing_settings_stays_light() -> None:
    heavy = "{'torch', 'numpy', 'cv2', 'PIL', 'fastapi', 'starlette', 'uvicorn'}"
    script = f"import sys, core.settings; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(st.integers(0, 1 << 50))
def test_sizes_survive_being_shown(size: int) -> None:
    assert units.read_size(units.show_size(size)) == size


@given(st.integers(0, 10**7))
def test_durations_survive_being_shown(milliseconds: int) -> None:
    seconds = milliseconds / 1000 if milliseconds < 1000 else float(milliseconds // 1000)
    assert units.read_duration(units.show_duration(seconds)) == pytest.approx(seconds, rel=1e-5)


@given(st.one_of(st.text(max_size=40), st.none(), st.booleans(), st.floats(), st.lists(st.integers()), st.integers()))
def test_nonsense_is_only_ever_a_value_error(value: object) -> None:
    for reader in (units.read_count, units.read_size, units.read_duration, units.read_caps):
        try:
            reader(value)
        except ValueError as fault:
            assert "should" in str(fault)
