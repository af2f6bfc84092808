"""Networks that spandrel reads: tiny ones of random weights, written as files and served as a worker would."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import BadOutput
from core.model import read_spec
from models import spandrel_file
from models.base import Item, Output
from models.enlarge import Enlarge
from models.lama import Lama
from tests.pure.lama_kit import IOPaint, lama_forward, mask_of, picture

pytest.importorskip("einops")
with spandrel_file.torchvision_stood_in():
    pytest.importorskip("spandrel")

from safetensors.torch import save_file
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.LaMa.__arch import LaMa as lama_arch
from spandrel.architectures.SPAN import SPAN

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"
CPU = torch.device("cpu")
NETWORKS = {
    "ESRGAN": lambda: ESRGAN(num_filters=8, num_blocks=1, scale=2),
    "Compact": lambda: Compact(num_feat=8, num_conv=1, upscale=2),
    "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
}


def written(folder: Path, network: torch.nn.Module, suffix: str = ".safetensors") -> Path:
    """A file of the network's weights, as they are usually published."""
    file, state = folder / f"weights{suffix}", network.state_dict()
    if suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        torch.save({"params_ema": state} if suffix == ".pth" else {"state_dict": state}, file)
    return file


def enlarge(file: Path, **options: Any) -> Enlarge:
    model = Enlarge({"weights": str(file), **options}, CPU)
    model.load()
    return model


def images(model: Any, *items: Item) -> list[np.ndarray]:
    ends = model.run(items)
    assert all(isinstance(end, Output) for end in ends), ends
    return [end.image for end in ends]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_picture_is_what_the_network_itself_makes_of_it_alone_or_in_a_batch(
    tmp_path: Path, name: str, suffix: str
) -> None:
    torch.manual_seed(1)
    network = NETWORKS[name]()
    file = written(tmp_path, network, suffix)
    pictures = [picture(24, 36, seed) for seed in range(3)]
    items = [Item({"scale": 2}, image) for image in pictures]
    alone = images(enlarge(file), *items)
    with torch.inference_mode():
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        wanted = (network.eval()(batch).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    shared = images(enlarge(file, max_rows=4), *items)
    for number in range(3):
        assert alone[number].shape == (48, 72, 3)
        assert np.abs(alone[number] - wanted[number]).max() <= 1
        assert np.abs(shared[number].astype(int) - alone[number]).max() <= 1


@pytest.mark.parametrize("size", [(40, 40), (41, 97), (90, 33), (23, 24)])
def test_tiles_join_without_a_seam_where_the_margin_holds_all_that_the_network_sees(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    torch.manual_seed(2)
    file = written(tmp_path, NETWORKS["Compact"]())  # three convolutions: it sees three pixels far
    image = picture(*size)
    whole, tiled = enlarge(file, tile=0), enlarge(file, tile=16, margin=4, max_rows=16)
    shapes: list[Any] = []
    forward = tiled.forward

    def watched(network: str, *inputs: torch.Tensor) -> Any:
        shapes.append(inputs[0].shape[1:])
        return forward(network, *inputs)

    tiled.forward = watched  # type: ignore[method-assign]
    (one,), (other,) = (images(model, Item({"scale": 2}, image)) for model in (whole, tiled))
    assert np.abs(one.astype(int) - other).max() <= 1
    assert len(set(shapes)) == 1 and max(shapes[0][:2]) <= 24, "and they share forwards"


def test_a_scale_that_is_not_the_network_s_is_refused(tmp_path: Path) -> None:
    model = enlarge(written(tmp_path, NETWORKS["ESRGAN"]()))
    (end,) = model.run([Item({"scale": 4}, picture(16, 16))])
    assert isinstance(end, BadOutput) and "enlarge 2 times" in end.message


@pytest.fixture
def small_lama(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """LaMa of a hundredth of its width, with batch norms that have seen something."""
    defaults = list(lama_arch.FFCResNetGenerator.__init__.__defaults__)
    defaults[0], defaults[2] = 4, 1  # width, blocks
    monkeypatch.setattr(lama_arch.FFCResNetGenerator.__init__, "__defaults__", tuple(defaults))
    torch.manual_seed(3)
    network = lama_arch.LaMa(in_nc=4, out_nc=3)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                buffer.uniform_(-0.2, 0.2)
    return network


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_lama_from_a_file_of_weights_gives_the_pixels_of_lama_from_torchscript(
    tmp_path: Path, small_lama: torch.nn.Module, suffix: str
) -> None:
    file = written(tmp_path, small_lama, suffix)
    example = torch.rand(1, 3, 120, 120), torch.ones(1, 1, 120, 120)
    torch.jit.trace(small_lama.eval(), example, check_trace=False).save(str(tmp_path / "traced.pt"))
    reference = IOPaint(lama_forward(tmp_path / "traced.pt"), 8)
    spec = read_spec((EXAMPLES / "lama_weights.toml").read_text(encoding="utf-8"), "lama_weights")
    params = spec.check_params({"hd_strategy_crop_trigger_size": 100, "hd_strategy_crop_margin": 20})
    cases = [(picture(90, 130, seed), mask_of(90, 130, (20 + seed, 30, 50 + seed, 70))) for seed in range(3)]
    for rows in (1, 4):
        model = Lama({**spec.options, "weights": str(file), "max_rows": rows}, CPU)
        model.load()
        found = images(model, *(Item(params, image, mask) for image, mask in cases))
        for (image, mask), pixels in zip(cases, found, strict=True):
            wanted = reference(image, mask, trigger=100, margin=20)
            apart = np.abs(pixels.astype(int) - wanted)
            assert apart.max() <= 1 and np.count_nonzero(apart) <= 1e-4 * apart.size
            assert np.array_equal(pixels[mask == 0], image[mask == 0]) and not np.array_equal(pixels, image)


class Code:
    """What a pickle does that is more than weights."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


def test_what_is_no_such_network_is_refused_with_a_sentence(tmp_path: Path, small_lama: torch.nn.Module) -> None:
    def refusal(model: type[Enlarge | Lama], file: Path) -> str:
        with pytest.raises(ValueError) as found:
            model({"weights": str(file)}, CPU).load()
        assert str(tmp_path) not in str(found.value) and file.name in str(found.value)
        return str(found.value)

    assert "no network that inpaints" in refusal(Lama, written(tmp_path, NETWORKS["Compact"]()))
    assert "gives one" in refusal(Enlarge, written(tmp_path, small_lama))
    assert "no network that spandrel knows" in refusal(Enlarge, written(tmp_path, torch.nn.Linear(2, 2)))
    for suffix, content in ((".pth", pickle.dumps(Code())), (".ckpt", b"no pickle"), (".safetensors", b"cut off")):
        file = tmp_path / f"bad{suffix}"
        file.write_bytes(content)
        assert "holds code" in refusal(Enlarge, file) or "cannot be read" in refusal(Enlarge, file)
    torch.save({"params": Code()}, tmp_path / "code.pth")
    assert "holds code" in refusal(Enlarge, tmp_path / "code.pth")


def test_no_stand_in_for_torchvision_stays_behind() -> None:
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__file__


def test_the_examples_are_models() -> None:
    for name in ("lama_weights", "realesrgan_x4"):
        spec = read_spec((EXAMPLES / f"{name}.toml").read_text(encoding="utf-8"), name)
        assert spec.weights is not None and "weights" in (spec.lacks() or "")
