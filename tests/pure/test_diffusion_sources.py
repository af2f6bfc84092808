"""Where models come from, and which are refused before they are loaded, with a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusion_kit import build, folder_of, images, item, model, only, same

from core.errors import ModelFailed
from models.diffusion import sources
from models.diffusion.sources import Source, find


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the tiny SD 1.5 to be damaged."""
    return Path(shutil.copytree(folder_of("sd15"), tmp_path / "mine"))


def refusal(source: object, **options: object) -> str:
    with pytest.raises(ModelFailed) as refused:
        build("sd15", **{"source": str(source), **options})
    sentence = str(refused.value)
    assert "\n" not in sentence and "/tmp" not in sentence, "no paths, one sentence"
    return sentence


def pickled(folder: Path) -> None:
    from safetensors.torch import load_file

    file = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def test_pickles_are_refused_unless_they_are_trusted(copied):
    pickled(copied / "unet")
    assert "pickle" in refusal(copied) and "trust_pickle" in refusal(copied)
    trusted = build("sd15", source=str(copied), trust_pickle=True)
    assert same(only(trusted, item()), only(model("sd15"), item()))
    ckpt = copied / "model.ckpt"
    ckpt.write_bytes(b"\x80\x04.")
    assert "model.ckpt" in refusal(ckpt, pipeline="StableDiffusionPipeline")


def test_a_pickle_beside_safe_weights_is_not_looked_at(copied):
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04c__builtin__\nexit\n.")
    assert same(only(build("sd15", source=str(copied)), item()), only(model("sd15"), item()))


def test_what_is_missing_is_named(copied, tmp_path):
    assert "option 'source' is missing" in refusal("")
    assert "'nowhere' is not there" in refusal(tmp_path / "nowhere")
    assert "model_index.json" in refusal(copied / "unet")
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "cannot be loaded as StableDiffusionPipeline" in refusal(copied)
    (copied / "model_index.json").write_text("{")
    assert "cannot be read" in refusal(copied)


def test_damaged_weights_are_named(copied):
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "damaged" in refusal(copied)


def test_an_unknown_class_is_refused(copied):
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "_class_name": "MagicPipeline"}))
    assert "has no pipeline 'MagicPipeline'" in refusal(copied)
    assert "has no pipeline 'UNet2DModel'" in refusal(copied, pipeline="UNet2DModel")
    assert same(only(build("sd15", source=str(copied), pipeline="StableDiffusionPipeline"), item()),
                only(model("sd15"), item()))
    assert "dtype" in refusal(folder_of("sd15"), dtype="int3")


def test_a_missing_package_is_named(monkeypatch, copied):
    import diffusers

    def lacking(*_, **__):
        raise ImportError("please install `sentencepiece`")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lacking)
    assert "package is missing" in refusal(copied) and "sentencepiece" in refusal(copied)


def test_a_single_file_needs_its_pipelines_name(tmp_path):
    file = tmp_path / "all.safetensors"
    file.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    assert "which pipeline" in refusal(file)
    assert "cannot be loaded" in refusal(file, pipeline="StableDiffusionPipeline", offline=True)


@pytest.mark.parametrize("layout", ["models/Qwen/Tiny-1___5", "hub/Qwen/Tiny-1.5", "Qwen/Tiny-1___5"])
def test_modelscopes_cache_is_found_where_its_variable_says(tmp_path, layout, monkeypatch):
    shutil.copytree(folder_of("sd15"), tmp_path / layout)
    environ = {"MODELSCOPE_CACHE": str(tmp_path)}
    assert find({"source": "modelscope:Qwen/Tiny-1.5"}, environ).path == tmp_path / layout
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    assert images(build("sd15", source="modelscope:Qwen/Tiny-1.5"), item())[0].shape == (64, 64, 3)
    for named, about in (("Qwen/Other", "'offline' is set"), ("../../etc", "no ModelScope id")):
        with pytest.raises(ModelFailed, match=about):
            find({"source": f"modelscope:{named}", "offline": True}, environ)
    with pytest.raises(ModelFailed, match="pip install modelscope"):
        find({"source": "modelscope:Qwen/Other"}, environ)


def test_a_hub_id_is_looked_for_in_the_cache_when_offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "'offline' is set" in refusal("owner/tiny", offline=True)


def test_a_hub_that_cannot_be_reached_is_told_as_such(monkeypatch):
    import diffusers

    def unreachable(*args, **more):
        raise OSError("Got: ConnectError: [Errno -2] Name or service not known")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    assert "the hub cannot be reached" in refusal("owner/tiny") and "Errno" not in refusal("owner/tiny")


def test_variants_are_chosen_and_their_absence_told(copied):
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (copied / name).glob("*.safetensors")
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    chosen = Source(copied, "fp16").weights()
    assert all("fp16" in file.name for files in chosen.values() for file in files)
    assert all("fp16" not in file.name for files in Source(copied).weights().values() for file in files)
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelFailed, match="only there as fp16"):
        Source(copied).weights()
    made = build("sd15", source=str(copied), variant="fp16")
    assert same(only(made, item()), only(model("sd15"), item()))


def test_sizes_are_those_of_the_weights_in_the_dtype_they_get():
    found = Source(folder_of("sd15")).sizes()
    assert set(found) == {"unet", "vae", "text_encoder"}
    parameters = sum(p.numel() for p in model("sd15")._base.unet.parameters())
    assert found["unet"] == 4 * parameters and Source(folder_of("sd15")).sizes(2)["unet"] == 2 * parameters


def test_sharded_weights_belong_together():
    names = ["model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors",
             "diffusion_pytorch_model-00001-of-00003.fp16.safetensors", "model.safetensors.index.json"]
    matches = [sources.WEIGHTS.fullmatch(name) for name in names]
    assert [match and (match["before"] or match["after"] or "") for match in matches][:3] == ["", "fp16", "fp16"]


def test_weights_can_be_fetched_before_the_server_starts(tmp_path, capsys):
    from models.diffusion.fetch import main

    head = 'adapter = "models.diffusion.adapter:Diffusion"\ntask = "generate"\n[options]\noffline = true\n'
    there, gone = tmp_path / "tiny.toml", tmp_path / "gone.toml"
    there.write_text(f'{head}source = "{folder_of("sd15")}"\n')
    gone.write_text(f'{head}source = "{tmp_path}/nowhere"\n')
    assert main([str(there)]) == 0 and "unet 2." in capsys.readouterr().out
    assert main([str(there), str(gone)]) == 1 and "'nowhere' is not there" in capsys.readouterr().err
    assert main([]) == 2
