"""Models by hub id, fetched by the hub's own library from a hub on loopback: what comes, what stays, what is said."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_kit import build, folder_of, item, model, only, same

from core.errors import ModelFailed
from models.diffusion import fetch
from models.diffusion.sources import Source, find
from tests import model_hub
from tests.hub_kit import point
from tests.model_hub import COMMIT, TOKEN, Hub

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with `owner/tiny`, a Stable Diffusion 1.5, and the real client pointed at it, with an empty cache."""
    with model_hub.hub(tiny=folder_of("sd15")) as made:
        point(monkeypatch, made.url, tmp_path / "cache")
        yield made


def refusal(name: str = "owner/tiny", **options: Any) -> str:
    with pytest.raises(ModelFailed) as refused:
        find({"source": name, **options})
    sentence = refused.value.message
    assert "\n" not in sentence and "/tmp" not in sentence and "127.0.0.1" not in sentence and len(sentence) < 300
    assert sentence.startswith(f"'{name}' cannot be had from the Hugging Face hub: ")
    return sentence.partition("hub: ")[2]


def test_a_hub_id_is_fetched_once_and_then_found_without_the_hub(hub: Hub) -> None:
    made = build("sd15", source="owner/tiny")
    assert same(only(made, item()), only(model("sd15"), item()))
    assert len(hub.downloads(UNET)) == 1
    hub.heard.clear()
    assert find({"source": "owner/tiny"}).path.name == COMMIT and not hub.downloads("safetensors")
    hub.heard.clear()
    found = find({"source": "owner/tiny", "offline": True})
    assert (found.path / UNET).read_bytes() == (folder_of("sd15") / UNET).read_bytes()
    assert not hub.heard
    hub.down = True
    assert find({"source": "owner/tiny"}).path == found.path, "what is there is used while the hub is down"


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB are kept or lost together
    hub.cuts[UNET] += [1000, 70_000]
    found = find({"source": "owner/tiny"})
    assert [one.start for one in hub.downloads(UNET)] == [0, 1000, 71_000]
    assert (found.path / UNET).read_bytes() == (folder_of("sd15") / UNET).read_bytes()


def test_what_came_before_the_hub_went_down_is_not_fetched_again(hub: Hub) -> None:
    hub.cuts[UNET] += [0] * 20
    assert refusal().startswith("the hub cannot be reached, or breaks off")
    assert "only part of it is in the cache" in refusal(offline=True)
    before = hub.downloads("model.safetensors")
    hub.cuts.clear()
    hub.heard.clear()
    assert find({"source": "owner/tiny"}).weights().keys() == {"unet", "vae", "text_encoder"}
    assert before and len(hub.downloads(UNET)) == 1 and not hub.downloads("text_encoder/model.safetensors")


def test_a_hub_that_goes_down_in_the_middle(hub: Hub) -> None:
    hub.cuts[UNET].append(50_000)
    hub.falls = True
    assert refusal() == "the hub answers with HTTP 503; try again later"
    hub.down = False
    assert (find({"source": "owner/tiny"}).path / UNET).is_file()


def test_what_the_hub_does_not_give_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["owner/part"] = folder_of("sd15") / "unet"
    assert "there is no model of that name, or it is private" in refusal("owner/none")
    assert refusal(revision="v7") == "it has no revision 'v7'"
    assert "no model_index.json" in refusal("owner/part")
    assert "'offline' is set" in refusal(offline=True)
    hub.down = True
    assert refusal() == "the hub answers with HTTP 503; try again later"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal() == "it is not in the cache, and the environment says HF_HUB_OFFLINE"


def test_where_nobody_answers_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert refusal().startswith("the hub cannot be reached")


def test_a_gated_model_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("owner/tiny")
    assert "accept them on its page" in refusal() and "HF_TOKEN" in refusal()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find({"source": "owner/tiny"}).is_pipeline
    assert all(one.token for one in hub.downloads(UNET))


def test_pickles_are_left_where_they_are(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, only_pickles = tmp_path / "both", tmp_path / "pickles"
    for folder in (both, only_pickles):
        shutil.copytree(folder_of("sd15"), folder)
        torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    (only_pickles / UNET).unlink()
    hub.repos |= {"owner/both": both, "owner/pickles": only_pickles}
    find({"source": "owner/both"})
    assert hub.downloads(UNET) and not hub.downloads(".bin")
    assert "no .safetensors weights" in refusal("owner/pickles") and not hub.downloads(".bin")
    trusted = find({"source": "owner/pickles", "trust_pickle": True})
    assert [file.suffix for file in trusted.weights()["unet"]] == [".bin"]


def test_a_variant_is_fetched_alone(hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("sd15"), tmp_path / "variants"))
    for file in list(folder.rglob("*.safetensors")):
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    hub.repos["owner/tiny"] = folder
    assert find({"source": "owner/tiny", "variant": "fp16"}).sizes().keys() == {"unet", "vae", "text_encoder"}
    assert {one.path.endswith(".fp16.safetensors") for one in hub.downloads(".safetensors")} == {True}


def test_a_controlnet_has_an_id_of_its_own(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/canny"] = folder_of("sd15-controlnet") / "controlnet"
    made = build("sd15", source="owner/tiny", controlnets={"canny": "owner/canny"})
    assert list(made._control_nets) == ["canny"]
    with pytest.raises(ModelFailed, match="there is no model of that name"):
        build("sd15", controlnets={"canny": "owner/none"})
    damaged = Path(shutil.copytree(folder_of("sd15-controlnet") / "controlnet", tmp_path / "damaged"))
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelFailed, match="the ControlNet for 'canny' cannot be loaded") as refused:
        build("sd15", controlnets={"canny": str(damaged)})
    assert str(tmp_path) not in refused.value.message


def test_fetching_beforehand(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text('adapter = "models.diffusion.adapter:Diffusion"\ntask = "generate"\n'
                    '[options]\nsource = "owner/tiny"\n')
    assert fetch.main([str(file)]) == 0 and "unet 2." in capsys.readouterr().out
    assert Source(find({"source": "owner/tiny", "offline": True}).path).is_pipeline
    hub.repos.clear()
    use = file.read_text().replace("owner/tiny", "owner/gone")
    file.write_text(use)
    assert fetch.main([str(file)]) == 1
    assert capsys.readouterr().err.startswith("tiny: 'owner/gone' cannot be had from the Hugging Face hub: there is no")
