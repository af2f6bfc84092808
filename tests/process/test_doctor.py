"""The doctor finds what would stop the server, says what to do, and answers with the exit code."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api import checks
from core.settings import Settings
from engine import doctor
from engine.doctor import Finding
from workers.devices import Gpu


def settings(tmp_path: Path, *argv: str) -> Settings:
    return Settings.read(["--port", "0", "--outputs", str(tmp_path / "outputs"), "--devices", "cpu:1", *argv])


def marks(check: Callable[[Settings], Any], given: Settings) -> str:
    return "".join(finding.mark for finding in check(given))


def test_this_machine_can_serve_and_is_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(settings(tmp_path)) == 0
    told = capsys.readouterr().out
    assert "✗" not in told and "worker cpu:0" in told and "torch" in told and "AVIF" in told and "models" in told
    assert told.splitlines()[-1].startswith("The server can start")
    assert list(tmp_path.iterdir()) == []


def test_one_cross_makes_exit_code_1_and_every_cross_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.storage, doctor.models))
    assert doctor.run(settings(tmp_path, "--min-free-disk", "1000TiB", "--models", "nothing_like_it")) == 1
    told = capsys.readouterr().out
    assert told.count("✗") == told.count("→") == 2 and told.endswith("2 of 3 checks stop the server.\n")
    assert "no model file for: nothing_like_it" in told and "make room" in told


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        given = settings(tmp_path, "--host", "127.0.0.1", "--port", str(holder.getsockname()[1]))
        (finding,) = doctor.port(given)
    assert finding.mark == "✗" and "cannot be taken" in finding.what and "--port" in finding.advice
    assert marks(doctor.port, settings(tmp_path, "--host", "127.0.0.1")) == "✓"
    assert marks(doctor.port, settings(tmp_path, "--host", "256.0.0.1")) == "✗"


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file where the folder should be")
    (finding,) = doctor.storage(settings(tmp_path))
    assert finding.mark == "✗" and "Not a directory" in finding.what
    assert marks(doctor.storage, settings(tmp_path, "--outputs", str(tmp_path / "a" / "b"))) in "✓!"


def test_a_nearly_full_disk_is_a_warning(tmp_path: Path) -> None:
    assert marks(doctor.storage, settings(tmp_path, "--retention-bytes", "1000TiB")) == "!"


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "list_gpus", list)
    (finding,) = doctor.devices(settings(tmp_path, "--devices", "cuda:3"))
    assert finding.mark == "✗" and "there is no cuda:3" in finding.what


@pytest.mark.parametrize(
    ("told", "nvml", "mark", "sentence"),
    [
        ({"version": "2.13.0", "cuda": "13.0", "devices": 1}, True, "✓", "runs on the GPU"),
        ({"version": "2.13.0", "cuda": "13.0", "devices": 0}, True, "✗", "for CUDA 13.0 sees no GPU"),
        ({"version": "2.13.0+cpu", "cuda": None, "devices": 0}, True, "✗", "is built without CUDA"),
        ("ImportError: libcudart", True, "✗", "torch does not run: ImportError: libcudart"),
        ({"version": "2.13.0", "cuda": "13.0", "devices": 1}, False, "!", "NVML does not list"),
    ],
)
def test_what_torch_says_is_held_against_the_plan(
    told: Any, nvml: bool, mark: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "list_gpus", lambda: [Gpu(0, "GPU-a", "Fake")] if nvml else [])
    monkeypatch.setattr(doctor, "_probe", lambda *_: told)
    found = list(doctor.devices(settings(tmp_path, "--devices", "auto")))
    finding = found[-1] if found[-1].what.startswith("torch") else found[-2]
    assert finding.mark == mark and sentence in finding.what


def test_codecs_that_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda *_: {"avif": "no encoder"})
    (finding,) = doctor.codecs(settings(tmp_path))
    assert finding.mark == "✗" and "avif cannot be read and written: no encoder" in finding.what


def test_a_probe_that_crashes_is_a_sentence() -> None:
    assert doctor._probe("import os; os.kill(os.getpid(), 9)") == "it exited with -9"
    assert doctor._probe("import nothing_like_it") == "ModuleNotFoundError: No module named 'nothing_like_it'"
    assert doctor._probe("print('noise'); print('[1]')") == [1]


def test_shared_memory_beyond_reason(tmp_path: Path) -> None:
    assert marks(doctor.memory, settings(tmp_path, "--arena-bytes", str(1 << 62))) == "✗"


def test_few_file_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, mark in ((256, "✗"), (1024, "!"), (65_536, "✓")):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, 1 << 20))
        assert marks(doctor.files, settings(tmp_path)) == mark


def test_missing_and_different_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert marks(doctor.packages, settings(tmp_path)) == "✓"
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("# a comment\nnothing-like-it==1.0\npytest[extra]==0.0.1\n")
    missing, other = doctor.packages(settings(tmp_path))
    assert missing.mark == "✗" and "nothing-like-it" in missing.what
    assert other.mark == "!" and re.search(r"pytest\[extra\] \S+ instead of 0\.0\.1", other.what)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "lama.toml").write_text(
        'adapter = "models.lama:Lama"\ntask = "inpaint"\n[options]\nweights = "/nowhere/big-lama.pt"\n'
    )
    given = settings(tmp_path, "--models-folder", str(tmp_path), "--models", "lama")
    assert [finding.mark for finding in doctor.models(given)] == ["✓", "✗"]
    (tmp_path / "lama.toml").write_text("adapter = 3 4")
    assert marks(doctor.models, given) == "✗"


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    given = settings(tmp_path, "--keys-file", str(file))
    assert marks(doctor.keys, given) == "✗"
    file.write_text("[[key")
    assert marks(doctor.keys, given) == "✗"
    file.write_text("")
    assert marks(doctor.keys, given) == "✓"
    assert marks(doctor.keys, settings(tmp_path)) == marks(doctor.keys, settings(tmp_path, "--host", "::1")) == "✓"
    assert marks(doctor.keys, settings(tmp_path, "--host", "0.0.0.0")) == "!"


def test_a_check_that_breaks_is_a_cross_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Settings) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.python))
    found = [finding for check in doctor.CHECKS for finding in doctor._safely(check, settings(tmp_path))]
    assert [finding.mark for finding in found] == ["✗", "✓"] and "boom" in found[0].what


def test_a_finding_is_one_line_and_an_advice() -> None:
    assert str(Finding("!", "low", "do it")) == "! low\n    → do it" and str(Finding("✓", "good")) == "✓ good"


def test_the_doctor_itself_stays_light() -> None:
    script = "import sys, engine.doctor; print(sorted({'torch', 'numpy', 'cv2', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=doctor.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_models_of_one_s_own_that_cannot_be_imported(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    assert marks(doctor.models, settings(tmp_path, "--models-folder", str(folder))) == "✗", "there is no such folder"
    folder.mkdir()
    spec = 'adapter = "{}"\ntask = "style"\n'
    for name, adapter in {"good": "tinted:Good", "lost": "lost:Lost", "odd": "tinted:Odd", "bad": "broken:Bad"}.items():
        (folder / f"{name}.toml").write_text(spec.format(adapter))
    (folder / "tinted.py").write_text("from models.base import Adapter\nclass Good(Adapter): ...\nclass Odd: ...\n")
    (folder / "broken.py").write_text("import tinted\nraise ValueError('at once')\n")
    found = list(doctor.adapters(settings(tmp_path, "--models-folder", str(folder))))
    told = {finding.what.split("'")[1]: finding.what for finding in found}
    assert sorted(told) == ["bad", "lost", "odd"] and {finding.mark for finding in found} == {"✗"}
    assert "put lost.py beside" in told["lost"] and "ValueError: at once" in told["bad"]
    assert "is no subclass of models.base.Adapter" in told["odd"]
    assert marks(doctor.adapters, settings(tmp_path, "--models-folder", str(folder), "--models", "good")) == "✓"


def test_entries_of_the_keys_file_that_the_door_would_not_take_or_not_limit(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    given = settings(tmp_path, "--keys-file", str(file))
    good = f'[[keys]]\nname = "a"\nsha256 = "{"0" * 64}"\ntenant = "t"\n'
    found = {}
    for text in (good, good + 'tier = "por"\n', good + "revoked = true\n", '[[keys]]\nsha256 = "x"\ntenant = "t"\n'):
        file.write_text(text)
        found[text] = list(checks.key_entries(given))
    assert ["".join(one.mark for one in findings) for findings in found.values()] == ["✓", "!✓", "!", "✗"]
    assert "the tier 'por', which there is not" in found[good + 'tier = "por"\n'][0].what


def test_files_that_settings_name_and_nobody_looks_at_before_they_are_wanted(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    given = settings(tmp_path, "--lora-folder", str(file), "--iopaint-input", str(tmp_path / "none.png"))
    assert marks(doctor.named, given) == "✗!"
    given = settings(tmp_path, "--lora-folder", str(tmp_path / "later"), "--iopaint-input", str(file))
    assert marks(doctor.named, given) == ""
