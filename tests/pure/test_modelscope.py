"""Models from ModelScope: every layout that its cache has had, what is only half there, and its own library."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusion_kit import build, folder_of, item, model, only, same

from core.errors import ModelFailed
from models.diffusion import hubs
from models.diffusion.sources import find

ROOT = Path(__file__).resolve().parents[2]
NAME = "Qwen/Tiny-1.5"
NEWEST = "models/Qwen--Tiny-1.5/snapshots/master"
LAYOUTS = [
    NEWEST, "models/Qwen/Tiny-1___5", "hub/models/Qwen/Tiny-1___5", "hub/Qwen/Tiny-1___5", "hub/Qwen/Tiny-1.5",
    "Qwen/Tiny-1___5", "Qwen/Tiny-1.5", "models/Qwen/Tiny-1.5",
]


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library is not there."""
    monkeypatch.setitem(sys.modules, "modelscope", None)


def refusal(cache: Path, name: str = NAME, **options: Any) -> str:
    with pytest.raises(ModelFailed) as refused:
        find({"source": f"modelscope:{name}", **options}, {"MODELSCOPE_CACHE": str(cache)})
    assert "/tmp" not in refused.value.message and "\n" not in refused.value.message
    return refused.value.message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_cache_is_found_where_its_variable_says(tmp_path: Path, layout: str) -> None:
    shutil.copytree(folder_of("sd15"), tmp_path / layout)
    environ = {"MODELSCOPE_CACHE": str(tmp_path)}
    assert find({"source": f"modelscope:{NAME}", "offline": True}, environ).path == tmp_path / layout


def test_without_its_variable_the_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for layout in ("hub/models/Qwen/Tiny-1___5", NEWEST):  # of before 1.38, and since
        folder = tmp_path / ".cache" / "modelscope" / layout
        shutil.copytree(folder_of("sd15"), folder)
        assert find({"source": f"modelscope:{NAME}", "offline": True}, {}).path == folder


def test_a_model_from_there_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder_of("sd15"), tmp_path / NEWEST)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    assert same(only(build("sd15", source=f"modelscope:{NAME}"), item()), only(model("sd15"), item()))


def test_the_wanted_revision_is_taken(tmp_path: Path) -> None:
    for revision in ("v1", "v2"):
        shutil.copytree(folder_of("sd15"), tmp_path / NEWEST.replace("master", revision))
    environ = {"MODELSCOPE_CACHE": str(tmp_path)}
    found = find({"source": f"modelscope:{NAME}", "revision": "v2", "offline": True}, environ)
    assert found.path.name == "v2"
    assert "not in ModelScope's cache" in refusal(tmp_path, offline=True), "two, and none of them is the usual one"


def test_a_controlnet_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "models/Qwen--Canny/snapshots/master"
    shutil.copytree(folder_of("sd15-controlnet") / "controlnet", folder)
    options = {"source": "modelscope:Qwen/Canny", "offline": True}
    assert find(options, {"MODELSCOPE_CACHE": str(tmp_path)}, one_network=True).path == folder


def test_what_is_only_half_there_is_not_taken_for_whole(tmp_path: Path, packaged: None) -> None:
    folder = Path(shutil.copytree(folder_of("sd15"), tmp_path / NEWEST))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "x.safetensors.incomplete")
    assert "only partly in ModelScope's cache (missing: unet/weights)" in refusal(tmp_path, offline=True)
    assert "pip install modelscope" in refusal(tmp_path)
    shutil.rmtree(folder / "vae")
    (folder / "unet" / "x.safetensors.incomplete").rename(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert "(missing: vae)" in refusal(tmp_path, offline=True)


def test_a_shard_that_is_listed_must_be_there(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("sd15"), tmp_path / "model"))
    listing = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    listing.write_text('{"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "second.safetensors"}}')
    assert hubs.lacks(folder) == "unet/second.safetensors"
    listing.unlink()
    assert hubs.lacks(folder) == ""


def test_a_safety_checker_may_be_left_out_by_whom_it_does_not_serve(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("sd15"), tmp_path / NEWEST))
    index = folder / "model_index.json"
    checker = '["stable_diffusion", "StableDiffusionSafetyChecker"]'
    text = index.read_text().replace('"safety_checker": [\n    null,\n    null\n  ]', f'"safety_checker": {checker}')
    index.write_text(text)
    assert "(missing: safety_checker)" in refusal(tmp_path, offline=True)
    environ = {"MODELSCOPE_CACHE": str(tmp_path)}
    assert find({"source": f"modelscope:{NAME}", "safety_checker": False, "offline": True}, environ).path == folder


def test_what_is_nowhere_is_told(tmp_path: Path, packaged: None) -> None:
    assert "'offline' is set" in refusal(tmp_path, "Qwen/Other", offline=True)
    assert "no ModelScope id" in refusal(tmp_path, "../../etc")
    assert "pip install modelscope" in refusal(tmp_path, "Qwen/Other")


SCRIPT = """
import sys
from core.errors import ModelFailed
from models.diffusion.sources import find
from tests.model_hub import hub
from pathlib import Path

UNET = "unet/diffusion_pytorch_model.safetensors"
with hub(**{"Tiny-1.5": Path(sys.argv[1])}) as made:
    import os
    os.environ["MODELSCOPE_ENDPOINT"] = made.url
    wanted = {"source": "modelscope:owner/Tiny-1.5"}
    made.cuts[UNET] += [100_000]
    found = find(wanted)
    assert (found.path / UNET).read_bytes() == (Path(sys.argv[1]) / UNET).read_bytes()
    assert [one.start for one in made.downloads(UNET)] == [0, 100_000], made.downloads(UNET)
    assert not made.downloads(".bin"), "pickles stay where they are"
    made.heard.clear()
    assert find(wanted).path == find({**wanted, "offline": True}).path == found.path and not made.heard
    (found.path / UNET).unlink()
    assert find(wanted).path == found.path and len(made.downloads(".safetensors")) == 1, "only what is missing"
    try:
        find({"source": "modelscope:owner/none"})
    except ModelFailed as fault:
        assert "there is no model of that name" in str(fault), fault
    else:
        raise AssertionError("found")
print("all well")
"""


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is None, reason="modelscope is not installed")
def test_its_own_library_fetches_and_goes_on_after_a_break(tmp_path: Path) -> None:
    """In a process of its own: the library reads where its cache and its hub are when it is imported."""
    folder = Path(shutil.copytree(folder_of("sd15"), tmp_path / "repository"))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    environ = {**os.environ, "MODELSCOPE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, env=environ, capture_output=True,
                          text=True, timeout=150)  # fmt: skip
    assert done.returncode == 0 and "all well" in done.stdout, done.stderr[-3000:]


def test_a_name_is_no_way_out_of_the_cache(tmp_path: Path) -> None:
    for name in ("../x", "x/..", "a/b/c", "/etc", "a/.hidden"):
        assert "no ModelScope id" in refusal(tmp_path, name)
