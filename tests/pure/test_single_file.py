"""One file with all weights, under its makers' names: the same pictures, and nothing from the internet against the
operator's word."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusion_kit import build, folder_of, hole, item, model, only, picture, same

from core.errors import ModelFailed
from models.diffusion import fetch, sources
from models.diffusion.sources import Source, configuration
from tests import ldm_checkpoint, model_hub
from tests.hub_kit import point

USUAL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # whose configuration diffusers takes for such weights
HEAD = 'adapter = "models.diffusion.adapter:Diffusion"\ntask = "generate"\n[options]\n'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion 1.5 in one file."""
    return ldm_checkpoint.write(folder_of("sd15"), tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Its configuration: all but the weights."""
    without = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(folder_of("sd15"), tmp_path / "config", ignore=without))


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(ModelFailed) as refused:
        build("sd15", **{"source": str(source), **options})
    sentence = str(refused.value)
    assert "\n" not in sentence and "/tmp" not in sentence, "no paths, one sentence"
    return sentence


def test_it_makes_the_pictures_of_the_folder(checkpoint: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point(monkeypatch, "http://127.0.0.1:9", config.parent / "cache")  # nobody answers there
    made = build("sd15", source=str(checkpoint), config=str(config))
    for wanted in (item(), item(picture(1), strength=0.7), item(picture(2), hole())):
        assert same(only(made, wanted), only(model("sd15"), wanted))


def test_every_weight_is_there(checkpoint: Path) -> None:
    whole = Source(checkpoint).sizes()
    assert whole == {"everything": sum(Source(folder_of("sd15")).sizes().values())}


def test_the_class_may_be_named(checkpoint: Path, config: Path) -> None:
    named = build("sd15", source=str(checkpoint), config=str(config), pipeline="StableDiffusionImg2ImgPipeline")
    wanted = item(picture(1), strength=0.7)
    assert same(only(named, wanted), only(model("sd15"), wanted))


def test_it_needs_its_pipelines_name_or_a_configuration(checkpoint: Path) -> None:
    assert "which pipeline" in refusal(checkpoint) and "'config'" in refusal(checkpoint)


def test_offline_a_missing_configuration_is_told_and_the_hub_is_not_asked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model_hub.hub() as hub:
        point(monkeypatch, hub.url, tmp_path / "cache")
        told = refusal(checkpoint, pipeline="StableDiffusionPipeline", offline=True)
        assert told.startswith(f"the configuration for tiny.safetensors is missing: '{USUAL}' cannot be had")
        assert "'offline' is set" in told and "name a folder that has it" in told and "'config'" in told
        assert not hub.heard


def test_the_usual_configuration_comes_from_the_hub_once_and_without_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with model_hub.hub() as hub:
        hub.repos[USUAL] = folder_of("sd15")
        point(monkeypatch, hub.url, tmp_path / "cache")
        file = tmp_path / "single.toml"
        file.write_text(f'{HEAD}source = "{checkpoint}"\npipeline = "StableDiffusionPipeline"\n')
        assert fetch.main([str(file)]) == 0 and "everything" in capsys.readouterr().out
        assert hub.downloads(".json") and not hub.downloads(".safetensors")
        hub.heard.clear()
        made = build("sd15", source=str(checkpoint), pipeline="StableDiffusionPipeline", offline=True)
        assert same(only(made, item()), only(model("sd15"), item())) and not hub.heard


def test_a_configuration_may_be_another_models_on_the_hub(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model_hub.hub(tiny=folder_of("sd15")) as hub:
        point(monkeypatch, hub.url, tmp_path / "cache")
        found = configuration(Source(checkpoint), {"config": "owner/tiny"})
        assert (found / "unet" / "config.json").is_file() and not hub.downloads(".safetensors")
        assert "there is no model of that name" in refusal(checkpoint, config="owner/none")


def test_a_configuration_that_is_none_is_told(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    assert "'config', 'nowhere', is not there" in refusal(checkpoint, config=str(tmp_path / "nowhere"))
    assert "'config', 'unet', has no model_index.json" in refusal(checkpoint, config=str(config / "unet"))
    shutil.rmtree(config / "vae")
    assert "cannot be loaded as StableDiffusionPipeline" in refusal(checkpoint, config=str(config))


def test_what_holds_no_weights_is_told(tmp_path: Path, config: Path) -> None:
    file = tmp_path / "all.safetensors"
    file.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    assert "cannot be loaded as StableDiffusionPipeline" in refusal(file, config=str(config))
    file.write_bytes(b"no tensors")
    assert "damaged" in refusal(file, config=str(config))


def test_weights_of_no_known_kind_are_told(tmp_path: Path) -> None:
    file = tmp_path / "none.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelFailed, match="does not know weights"):
        sources._usual_model(Source(file))
