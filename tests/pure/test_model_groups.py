"""Which jobs may share a batch: those of one size, or, where the model takes mixed sizes, of one resolution class."""

from __future__ import annotations

import pytest

from core.header import ImageHeader
from core.model import ModelSpec, read_spec
from core.request import ImagePart
from core.ticket import Group

CAPS = ((512, 16), (1024, 8), (2048, 2))
HEAD = 'adapter = "models.lama:Lama"\ntask = "inpaint"\npad = 8\nmax_batch = 12\n'
MIXED = read_spec(HEAD + "mixed_sizes = true", "mixed")


def group(spec: ModelSpec, width: int, height: int, caps: tuple[tuple[int, int], ...] = CAPS, turn: int = 1) -> Group:
    return spec.group(ImagePart("image", b"", ImageHeader("png", width, height, turn), 1), {}, caps)


@pytest.mark.parametrize(("width", "height", "side", "limit"), [
    (1, 1, 512, 12), (512, 512, 512, 12), (1024, 256, 512, 12), (513, 512, 1024, 8), (800, 600, 1024, 8),
    (1025, 1024, 2048, 2), (2048, 2048, 2048, 2), (2049, 2048, 4096, 1), (16_000, 16_000, 16_384, 1),
])  # fmt: skip
def test_mixed_sizes_are_grouped_by_the_least_square_that_holds_them(
    width: int, height: int, side: int, limit: int
) -> None:
    found = group(MIXED, width, height)
    assert (found.height, found.width, found.limit) == (side, side, limit)


def test_images_of_one_class_share_a_group_whatever_their_shape_and_turn() -> None:
    assert group(MIXED, 300, 200) == group(MIXED, 511, 512) == group(MIXED, 77, 900, turn=6)
    assert group(MIXED, 300, 200) != group(MIXED, 600, 512)


def test_without_caps_there_are_classes_all_the_same() -> None:
    assert group(MIXED, 300, 200, ()).height == 512 and group(MIXED, 600, 600, ()).height == 1024


def test_other_models_are_grouped_by_their_padded_size() -> None:
    plain = read_spec(HEAD, "plain")
    assert (group(plain, 300, 203).height, group(plain, 300, 203).width) == (208, 304)
    assert group(plain, 300, 200) != group(plain, 308, 200)


def test_mixed_sizes_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="mixed_sizes"):
        read_spec(HEAD + "mixed_sizes = 3", "mine")


WORDS = """
adapter = "a:B"
task = "generate"
stepped = true
steps_param = "steps"
pad = 8
takes = {image = [0, 1], mask = [0, 1], reference = [0, 3]}
params.steps = {type = "int", default = 20}
params.width = {type = "int", default = 0}
params.height = {type = "int", default = 0}
"""


def test_what_is_made_from_words_alone_has_the_size_that_is_asked_for() -> None:
    spec = read_spec(WORDS, "words")
    assert spec.parts == {"image": (0, 1), "mask": (0, 1), "reference": (0, 3)}
    assert spec.canvas(None, spec.check_params({})) == (512, 512)
    asked = spec.check_params({"width": 1000, "height": 300, "steps": 4})
    assert spec.canvas(None, asked) == (300, 1000)
    group = spec.group(None, asked, ((512, 16), (1024, 8)))
    assert (group.height, group.width, group.limit, group.stepped) == (304, 1000, 1, True), "it is handed out alone"
    assert spec.cost(None, asked) == pytest.approx(4 * 300 * 1000 / 512**2)


def test_an_image_gives_the_size_where_none_is_asked_for() -> None:
    spec = read_spec(WORDS, "words")
    image = ImagePart("image", b"", ImageHeader("png", 640, 480), 1)
    assert spec.canvas(image, spec.check_params({})) == (480, 640)
    assert spec.canvas(image, spec.check_params({"height": 96})) == (96, 640)


@pytest.mark.parametrize("takes", ["3", "{picture = [0, 1]}", "{image = 1}", "{image = [2, 1]}", "{image = [0, 99]}"])
def test_what_a_model_takes_is_checked(takes: str) -> None:
    with pytest.raises(ValueError, match="'takes' must name roles"):
        read_spec(f'adapter = "a:B"\ntask = "x"\ntakes = {takes}\n', "words")


GROWS = """
adapter = "a:B"
task = "upscale"
scale_param = "scale"
steps_param = "steps"
params.scale = {type = "int", default = 2}
params.steps = {type = "int", default = 20}
"""
SIZED = """
adapter = "a:B"
task = "resize"
params.width = {type = "int", default = 0}
params.height = {type = "int", default = 0}
"""


@pytest.mark.parametrize(("text", "params", "cost"), [
    (GROWS, {}, 1), (GROWS, {"scale": 4}, 4), (GROWS, {"scale": 4, "steps": 100}, 20), (GROWS, {"steps": 10}, 0.5),
    (SIZED, {}, 1), (SIZED, {"width": 2048, "height": 1024}, 8), (SIZED, {"width": 64, "height": 64}, 1),
])  # fmt: skip
def test_the_cost_counts_steps_and_the_pixels_of_the_result(text: str, params: dict[str, int], cost: float) -> None:
    spec = read_spec(text, "some")
    image = ImagePart("image", b"", ImageHeader("png", 512, 512), 1)
    assert spec.cost(image, spec.check_params(params)) == pytest.approx(cost)
