"""The same pixels as IOPaint's: bit for bit alone, and hardly a grey level apart in any batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from lama_kit import IOPaint, cv2_forward, item, lama_forward, mask_of, picture, save_network

from core.errors import BadOutput, Cancelled, InvalidParameter
from models import hd_strategy
from models.base import Item, Output
from models.crops import Box, grow
from models.cv2_inpaint import Cv2Inpaint, bound
from models.hd_strategy import Strategy, fill
from models.lama import Lama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("weights") / "tiny-lama.pt")


@pytest.fixture(scope="module")
def reference(weights: Path) -> IOPaint:
    return IOPaint(lama_forward(weights), 8)


@pytest.fixture
def lama(weights: Path) -> Lama:
    return loaded(weights)


def loaded(weights: Path, **options: Any) -> Lama:
    model = Lama({"weights": str(weights), **options}, CPU)
    model.load()
    return model


def watched(model: Lama) -> tuple[Lama, list[tuple[int, ...]]]:
    """The model, and the shapes of the images that its network gets from now on."""
    asked: list[tuple[int, ...]] = []
    forward = model.forward
    model.forward = lambda *given: (asked.append(tuple(given[1].shape)), forward(*given))[1]  # type: ignore[method-assign]
    return model, asked


def images(model: Lama | Cv2Inpaint, items: Sequence[Item]) -> list[np.ndarray]:
    with torch.inference_mode():
        outputs = model.run(items)
    for output in outputs:
        if isinstance(output, Exception):
            raise output
    return [output.image for output in outputs if isinstance(output, Output) and output.image is not None]


def params(strategy: str = "Crop", trigger: int = 800, margin: int = 128, limit: int = 1280, keep: bool = True) -> Any:
    return {
        "hd_strategy": strategy, "hd_strategy_crop_trigger_size": trigger, "hd_strategy_crop_margin": margin,
        "hd_strategy_resize_limit": limit, "sd_keep_unmasked_area": keep,
    }  # fmt: skip


MIDDLE = mask_of(203, 301, (60, 90, 110, 170))
BORDER = mask_of(203, 301, (0, 0, 30, 40), (170, 260, 203, 301))
MANY = mask_of(203, 301, (10, 10, 30, 30), (25, 60, 60, 80), (100, 100, 103, 290), (150, 20, 190, 35))
GREY = np.where(cv2.GaussianBlur(picture(203, 301, 9)[:, :, 1], (0, 0), 9) > 140, np.uint8(128), np.uint8(127))
ALL = np.full((203, 301), 255, np.uint8)
CASES = {
    "the whole of a small picture": (MIDDLE, {}),
    "a hole at the border": (BORDER, {}),
    "several holes": (MANY, {}),
    "everything": (ALL, {}),
    "nothing": (np.zeros((203, 301), np.uint8), {}),
    "grey 128 is hole, grey 127 is not": (GREY, {}),
    "crop": (MIDDLE, {"trigger": 200}),
    "crop at the border": (BORDER, {"trigger": 200, "margin": 40}),
    "crops that overlap": (MANY, {"trigger": 200, "margin": 25}),
    "crop of a ragged mask": (GREY, {"trigger": 200, "margin": 7}),
    "crop of everything": (ALL, {"trigger": 200}),
    "a crop of nothing": (np.zeros((203, 301), np.uint8), {"trigger": 200}),
    "original": (MANY, {"strategy": "Original", "trigger": 200, "limit": 200}),
    "an unknown strategy is Original": (MANY, {"strategy": "Fnord", "trigger": 200, "limit": 200}),
    "resize": (MIDDLE, {"strategy": "Resize", "limit": 200}),
    "resize at the border": (BORDER, {"strategy": "Resize", "limit": 133}),
    "resize of a ragged mask": (GREY, {"strategy": "Resize", "limit": 150}),
    "resize of a picture that is small enough": (MIDDLE, {"strategy": "Resize", "limit": 301}),
}


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "change all"])
@pytest.mark.parametrize("case", CASES)
def test_alone_an_image_has_the_very_bytes_of_iopaint(case: str, keep: bool, lama: Lama, reference: IOPaint) -> None:
    mask, given = CASES[case]
    image = picture(203, 301, 1)
    (result,) = images(lama, [item("lama", image, mask, **params(**given, keep=keep))])
    assert np.array_equal(result, reference(image, mask, **given, keep=keep))
    if keep:
        assert np.array_equal(result[mask <= 127], image[mask <= 127]), "outside the hole every byte stays"
    if (mask > 127).any():
        assert (result != image)[mask > 127].mean() > 0.5, "and inside it does not"


@pytest.mark.parametrize("width", [800, 801])
def test_a_side_of_800_is_not_cropped_and_one_of_801_is(width: int, lama: Lama, reference: IOPaint) -> None:
    image, mask = picture(120, width, 2), mask_of(120, width, (40, 100, 60, 130), (50, 600, 80, 640))
    lama, asked = watched(lama)
    (result,) = images(lama, [item("lama", image, mask)])
    assert np.array_equal(result, reference(image, mask))
    assert asked == ([(1, 120, 800, 3)] if width == 800 else [(1, 120, 296, 3), (1, 120, 288, 3)])


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 257), (9, 5), (37, 53), (8, 8), (17, 900)])
def test_odd_sizes(size: tuple[int, int], lama: Lama, reference: IOPaint) -> None:
    image, mask = picture(*size, 3), mask_of(*size, (0, 0, max(1, size[0] // 2), max(1, size[1] // 2)))
    (result,) = images(lama, [item("lama", image, mask)])
    assert np.array_equal(result, reference(image, mask))


def test_where_enlarging_overshoots_a_byte_is_clipped_and_does_not_wrap() -> None:
    def stripes(image: np.ndarray, _: np.ndarray) -> np.ndarray:
        columns = np.where(np.arange(image.shape[1]) % 8 < 4, 255, 0).astype(np.uint8)
        return np.broadcast_to(columns[:, None], image.shape)

    class Stripes(Lama):
        def forward(self, network: str, *inputs: torch.Tensor) -> Any:
            filled = np.stack([stripes(image.numpy(), image.numpy()) for image in inputs[0]])
            return torch.from_numpy(filled), torch.ones(len(filled), dtype=torch.bool)

    image, mask = picture(240, 240), mask_of(240, 240, (60, 60, 180, 180))
    (result,) = images(Stripes({}, CPU), [item("lama", image, mask, **params("Resize", limit=60))])
    expected = IOPaint(stripes, 8)
    assert np.array_equal(result, expected(image, mask, "Resize", limit=60))
    assert expected.overshot > 1000, "bytes that IOPaint wraps round"


@pytest.mark.parametrize("rows", [2, 16])
def test_in_a_batch_at_most_one_sample_in_ten_thousand_is_one_grey_level_away(
    rows: int, weights: Path, reference: IOPaint
) -> None:
    given = [{"strategy": "Original"}, {"trigger": 200, "margin": 40}, {"trigger": 200, "margin": 40, "keep": False}]
    masks = [MIDDLE, BORDER, MANY, ALL]
    cases = [(picture(203, 301, n), masks[n % 4], given[n % 3]) for n in range(12)]
    model = loaded(weights, max_rows=rows)
    results = images(model, [item("lama", image, mask, **params(**kind)) for image, mask, kind in cases])
    apart = total = 0
    for (image, mask, kind), result in zip(cases, results, strict=True):
        distance = np.abs(result.astype(int) - reference(image, mask, **kind))
        assert distance.max() <= 1
        apart, total = apart + np.count_nonzero(distance), total + distance.size
        if kind.get("keep", True):
            assert np.array_equal(result[mask <= 127], image[mask <= 127])
    assert apart <= 1e-4 * total


def test_crops_of_one_request_and_of_others_share_a_forward_when_their_shapes_agree(weights: Path) -> None:
    kind = params(trigger=100, margin=20)
    first = item("lama", picture(200, 300), mask_of(200, 300, (50, 50, 80, 90), (120, 200, 150, 240)), **kind)
    second = item("lama", picture(160, 140), mask_of(160, 140, (70, 40, 100, 80)), **kind)
    for rows, forwards in ((16, [(3, 72, 80, 3)]), (0, [(1, 72, 80, 3)] * 3)):  # a CPU gains nothing by it
        model, asked = watched(loaded(weights, max_rows=rows))
        images(model, [first, second])
        assert asked == forwards
    assert Lama({}, torch.device("cuda"))._most_rows == 16


def test_a_bucket_makes_more_crops_agree_and_changes_nothing_outside_the_hole(weights: Path) -> None:
    kind = params(trigger=100, margin=20)
    masks = [mask_of(200, 300, (50, 50, 80 + n, 90 + 2 * n)) for n in (0, 9, 17)]
    cases = [item("lama", picture(200, 300, n), mask, **kind) for n, mask in enumerate(masks)]
    model, asked = watched(loaded(weights, bucket=128, max_rows=16))
    for case, result in zip(cases, images(model, cases), strict=True):
        assert np.array_equal(result[case.mask == 0], case.image[case.mask == 0])
    assert asked == [(3, 128, 128, 3)]


def test_the_image_that_was_given_is_not_written_to(lama: Lama) -> None:
    image = picture(203, 301)
    before = image.copy()
    for case in ("crop", "resize", "original"):
        images(lama, [item("lama", image, CASES[case][0], **params(**CASES[case][1]))])
    assert np.array_equal(image, before)


def test_a_cancelled_job_leaves_and_the_others_get_their_images(lama: Lama, reference: IOPaint) -> None:
    image = picture(203, 301)
    gone, here = item("lama", image, MIDDLE), item("lama", image, BORDER)
    gone.cancelled = lambda: True
    with torch.inference_mode():
        first, second = lama.run([gone, here])
    assert isinstance(first, Cancelled)
    assert isinstance(second, Output) and np.array_equal(second.image, reference(image, BORDER))


# --- precision ------------------------------------------------------------------------------------------------------


def test_reduced_precision_is_close_and_where_the_network_does_not_bear_it_float32_takes_its_place(
    weights: Path, reference: IOPaint, capfd: pytest.CaptureFixture[str]
) -> None:
    image = picture(203, 301)
    (result,) = images(loaded(weights, dtype="bfloat16"), [item("lama", image, MIDDLE)])
    distance = np.abs(result.astype(int) - reference(image, MIDDLE))
    assert 0 < distance.max() < 40 and not distance[MIDDLE == 0].any()

    class Fragile(Lama):
        def forward(self, network: str, *inputs: torch.Tensor) -> Any:
            if network != "float32":
                raise RuntimeError("Unsupported dtype BFloat16")
            return super().forward(network, *inputs)

    fragile = Fragile({"weights": str(weights), "dtype": "bfloat16"}, CPU)
    fragile.load()
    assert "runs in float32" in capfd.readouterr().err
    assert np.array_equal(images(fragile, [item("lama", image, MIDDLE)])[0], reference(image, MIDDLE))


def test_a_number_that_runs_over_is_computed_again_in_float32_and_nan_is_never_an_image(
    weights: Path, reference: IOPaint
) -> None:
    class Overflows(Lama):
        everywhere = False

        def forward(self, network: str, *inputs: torch.Tensor) -> Any:
            pixels, finite = super().forward(network, *inputs)
            return (pixels, finite) if network == "float32" and not self.everywhere else (pixels * 0, ~finite)

    model = Overflows({"weights": str(weights), "dtype": "bfloat16"}, CPU)
    model._bears = lambda network: True  # type: ignore[method-assign]
    model.load()
    image = picture(203, 301)
    assert np.array_equal(images(model, [item("lama", image, MIDDLE)])[0], reference(image, MIDDLE))
    model.everywhere = True
    with pytest.raises(BadOutput, match="NaN"):
        images(model, [item("lama", image, MIDDLE)])


@pytest.mark.parametrize("options", [{"channels_last": True}, {"warm_up": [[60, 100], [64, 64]]}])
def test_layout_and_warm_up_change_no_more_than_a_batch_does(
    options: dict[str, Any], weights: Path, reference: IOPaint
) -> None:
    model = loaded(weights, **options)
    model.warm_up()
    (result,) = images(model, [item("lama", picture(203, 301), MIDDLE)])
    distance = np.abs(result.astype(int) - reference(picture(203, 301), MIDDLE))
    assert distance.max() <= 1 and np.count_nonzero(distance) <= 1e-4 * distance.size


@pytest.mark.parametrize(("content", "about"), [(None, "not there"), (b"no zip at all", "fetch it again")])
def test_weights_that_cannot_be_loaded_are_told_by_name_and_without_their_folder(
    content: bytes | None, about: str, tmp_path: Path
) -> None:
    file = tmp_path / "big-lama.pt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=about) as refused:
        loaded(file)
    assert "big-lama.pt" in str(refused.value) and str(tmp_path) not in str(refused.value)


# --- cv2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["several holes", "crop at the border", "crops that overlap", "resize", "nothing"])
@pytest.mark.parametrize(("flag", "radius"), [("INPAINT_NS", 4), ("INPAINT_TELEA", 5)])
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "change all"])
def test_cv2_has_the_very_bytes_of_iopaint(case: str, flag: str, radius: int, keep: bool) -> None:
    mask, given = CASES[case]
    image = picture(203, 301, 1)
    asked = item("cv2", image, mask, **params(**given, keep=keep), cv2_flag=flag, cv2_radius=radius)
    (result,) = images(Cv2Inpaint({}, CPU), [asked])
    expected = IOPaint(cv2_forward(getattr(cv2, flag), radius), 1)
    assert np.array_equal(result, expected(image, mask, **given, keep=keep))


def test_cv2_takes_mixed_sizes_and_leaves_out_the_cancelled() -> None:
    small, large = item("cv2", picture(40, 30), ALL[:40, :30]), item("cv2", picture(90, 80), ALL[:90, :80])
    small.cancelled = lambda: True
    first, second = Cv2Inpaint({}, CPU).run([small, large])
    assert isinstance(first, Cancelled) and isinstance(second, Output) and second.image.shape == (90, 80, 3)


@pytest.mark.parametrize(("side", "radius", "cure"), [
    (1024, 100, "at most 10, a smaller hole"),
    (1024, 2**63, "at most 10, a smaller hole"),
    (8000, 1, "send a smaller hole"),
])
def test_cv2_refuses_before_it_starts_what_would_keep_it_for_minutes(
    side: int, radius: int, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "inpaint", lambda *given: pytest.fail("the work came before the check"))
    image, mask = np.zeros((side, side, 3), np.uint8), np.full((side, side), 255, np.uint8)
    (refused,) = Cv2Inpaint({}, CPU).run([item("cv2", image, mask, cv2_radius=radius)])
    assert isinstance(refused, InvalidParameter) and refused.details["parameter"] == "cv2_radius"
    assert cure in str(refused) and "Resize" in str(refused)


def test_what_cv2_advises_is_taken() -> None:
    masks = [np.full((1024, 1024), 255, np.uint8)]
    bound(10, masks)
    with pytest.raises(InvalidParameter):
        bound(11, masks)


def test_of_a_batch_cv2_refuses_only_what_takes_too_long() -> None:
    hard, easy = (item("cv2", picture(900, 900), np.full((900, 900), 255, np.uint8), cv2_radius=r) for r in (100, 1))
    easy.mask = mask_of(900, 900, (10, 10, 14, 14))
    refused, done = Cv2Inpaint({}, CPU).run([hard, easy])
    assert isinstance(refused, InvalidParameter) and isinstance(done, Output)


def test_many_holes_are_cropped_in_turns_and_have_the_same_bytes(
    lama: Lama, reference: IOPaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = picture(203, 301, 1), MANY.copy()
    mask[::40, ::40] = 255  # their crops overlap
    given = {"trigger": 200, "margin": 25}
    monkeypatch.setattr(hd_strategy, "AT_ONCE", 10_000)
    filling = fill(image, mask, Strategy(**given, pad=1))
    turns = [next(filling)]
    with contextlib.suppress(StopIteration):
        while True:
            turns.append(filling.send([piece.image for piece in turns[-1]]))
    assert len(turns) > 10 and max(map(len, turns)) > 1
    assert all(len(turn) == 1 or sum(piece.mask.size for piece in turn) <= 10_000 for turn in turns)
    (result,) = images(lama, [item("lama", image, mask, **params(**given))])
    assert np.array_equal(result, reference(image, mask, **given))


def test_a_mask_that_is_noise_is_refused_before_its_crops_fill_the_memory(lama: Lama) -> None:
    mask = np.zeros((1600, 1600), np.uint8)
    mask[::8, ::8] = 255
    with pytest.raises(InvalidParameter, match="40,000 holes"):
        images(lama, [item("lama", np.zeros((1600, 1600, 3), np.uint8), mask)])


# --- crops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("box", "margin", "crop"), [
    (Box(100, 100, 120, 110), 10, Box(90, 90, 130, 120)),
    (Box(0, 100, 20, 110), 10, Box(0, 90, 40, 120)),  # what the left border cuts off is added on the right
    (Box(185, 285, 200, 300), 10, Box(166, 266, 200, 300)),
    (Box(0, 0, 200, 300), 10, Box(0, 0, 200, 300)),
    (Box(10, 10, 13, 13), 0, Box(10, 10, 12, 12)),  # IOPaint halves downwards
    (Box(7, 7, 8, 8), 0, Box(7, 7, 8, 8)),  # and has an empty crop here; ours is the pixel
])  # fmt: skip
def test_a_crop_is_the_hole_with_its_margin_moved_into_the_picture(box: Box, margin: int, crop: Box) -> None:
    assert np.array_equal(grow(np.array([box]), margin, (300, 200)), [crop])


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (3, 300)])
def test_no_side_is_too_short_for_a_network_that_mirrors(size: tuple[int, int]) -> None:
    """Three halvings leave one pixel of eight, which reflection cannot pad; of sixteen they leave two."""
    from models.hd_strategy import pad

    padded = pad(np.zeros(size, np.uint8), 8)
    assert min(padded.shape) >= 16 and padded.shape[0] % 8 == padded.shape[1] % 8 == 0
    assert pad(np.zeros(size, np.uint8), 1).shape == size
