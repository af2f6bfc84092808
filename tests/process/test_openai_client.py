"""OpenAI's own client drives the real server: generations, edits with a mask, variations, streams, errors."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from core.model import read_spec
from models.paint import colour
from tests.process.kit import TEST_MODELS, RunningServer, photo, pixels, running
from tests.step_model import write_spec

OFFERED = "paint,repaint,edit,background_remove,adder"
PAINT = read_spec((TEST_MODELS / "paint.toml").read_text(), "paint")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("openai")
    models = shutil.copytree(TEST_MODELS, folder / "models")
    write_spec(models)
    spec = (models / "adder.toml").read_text() + '[params.prompt]\ntype = "string"\ndefault = ""\n'
    (models / "adder.toml").write_text(spec)
    flags = ("--models-folder", str(models))
    with running(folder / "outputs", *flags, devices="cpu:1", models=OFFERED) as started:
        yield started


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def decoded(text: str | None) -> np.ndarray:
    assert text
    return pixels(base64.b64decode(text))


def painted(**params: object) -> tuple[int, int, int]:
    return colour(PAINT.check_params(params))


def mask_png(width: int = 48, height: int = 32) -> bytes:
    """Opaque, but transparent in its left half."""
    alpha = np.full((height, width, 4), 255, np.uint8)
    alpha[:, : width // 2, 3] = 0
    file = io.BytesIO()
    Image.fromarray(alpha).save(file, "PNG")
    return file.getvalue()


def test_images_from_words(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="gpt-image-2", prompt="a boat", n=2, size="64x48", quality="high",
        extra_body={"seed": 5, "num_inference_steps": 7, "guidance_scale": 3, "negative_prompt": "fog"},
    )  # fmt: skip
    assert answer.data and answer.size == "64x48" and answer.quality == "high" and answer.output_format == "png"
    for number, image in enumerate(answer.data):
        want = painted(
            prompt="a boat", width=64, height=48, seed=5 + number, steps=7, guidance=3, negative_prompt="fog"
        )
        assert decoded(image.b64_json).shape == (48, 64, 3)
        assert (decoded(image.b64_json) == want).all()


def test_without_a_seed_every_image_is_another(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a boat", n=3)
    assert answer.data and len({image.b64_json for image in answer.data}) == 3


def test_formats(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="x", output_format="webp", output_compression=50)
    assert answer.data and answer.data[0].b64_json
    assert base64.b64decode(answer.data[0].b64_json)[8:12] == b"WEBP"


def test_addresses_that_can_be_fetched(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a house", response_format="url", size="40x40", extra_body={"seed": 1})
    assert answer.data and answer.data[0].url
    image = httpx.get(answer.data[0].url)
    assert image.headers["content-type"] == "image/png"
    assert (pixels(image.content) == painted(prompt="a house", width=40, height=40, seed=1)).all()
    assert client.images.generate(model="dall-e-3", prompt="a house").data[0].url  # type: ignore[index]


def test_a_mask_s_transparent_part_is_edited(client: openai.OpenAI) -> None:
    before = pixels(photo(3))
    answer = client.images.edit(
        image=("a.png", photo(3)), mask=("m.png", mask_png()), prompt="a door", extra_body={"strength": 1, "seed": 2}
    )
    after = decoded(answer.data[0].b64_json)  # type: ignore[index]
    assert (after[:, 24:] == before[:, 24:]).all()
    assert not (after[:, :24] == before[:, :24]).all(axis=2).any()
    assert len(np.unique(after[:, :24].reshape(-1, 3), axis=0)) == 1


def test_several_images_are_one_and_its_references(client: openai.OpenAI) -> None:
    answer = client.images.edit(
        model="repaint", image=[("a.png", photo(1)), ("b.png", photo(2))], prompt="both", extra_body={"seed": 4}
    )
    assert decoded(answer.data[0].b64_json).shape == (32, 48, 3)  # type: ignore[index]


def test_variations(client: openai.OpenAI) -> None:
    answer = client.images.create_variation(image=("a.png", photo(1)), n=2)
    one, other = (decoded(image.b64_json) for image in answer.data or ())
    assert one.shape == (32, 48, 3) and (one != other).any()


def test_the_classical_edit_is_there_when_it_is_named(client: openai.OpenAI) -> None:
    answer = client.images.edit(model="edit", image=("a.png", photo(1)), prompt="black and white")
    after = decoded(answer.data[0].b64_json)  # type: ignore[index]
    assert np.ptp(after.astype(int), axis=2).max() < 16 < np.ptp(pixels(photo(1)).astype(int), axis=2).max()


def test_a_transparent_background(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=("a.png", photo(1)), prompt="x", background="transparent", output_format="webp")
    assert answer.data and answer.background == "transparent"
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
    assert (image.mode, image.format, image.size) == ("RGBA", "WEBP", (48, 32))
    events = list(client.images.generate(prompt="x", size="48x32", background="transparent", stream=True))
    assert events[-1].type == "image_generation.completed" and events[-1].background == "transparent"
    assert Image.open(io.BytesIO(base64.b64decode(events[-1].b64_json))).mode == "RGBA"
    kept = client.images.generate(prompt="x", size="48x32", background="transparent", response_format="url")
    assert kept.data and Image.open(io.BytesIO(httpx.get(kept.data[0].url or "").content)).mode == "RGBA"
    with pytest.raises(openai.BadRequestError, match="png or webp") as refused:
        client.images.generate(prompt="x", background="transparent", output_format="jpeg")
    assert refused.value.param == "background"


def test_too_many_images_are_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="17 images were sent") as refused:
        client.images.edit(image=[(f"{number}.png", photo(number)) for number in range(17)], prompt="x")
    assert refused.value.param == "image"
    with pytest.raises(openai.BadRequestError, match="n=1"):
        client.images.generate(prompt="x", n=2, stream=True)


def test_a_stream(client: openai.OpenAI, server: RunningServer) -> None:
    events = list(client.images.generate(prompt="a tree", stream=True, partial_images=2, extra_body={"seed": 9}))
    last = events[-1]
    assert last.type == "image_generation.completed"
    assert (decoded(last.b64_json) == painted(prompt="a tree", seed=9)).all()
    assert last.usage.total_tokens == 0 and last.size == "512x512"


def test_a_stream_shows_previews_of_a_model_that_steps(client: openai.OpenAI) -> None:
    events = list(client.images.generate(
        model="adder", prompt="x", size="48x32", stream=True, partial_images=1,
        extra_body={"num_inference_steps": 60},
    ))  # fmt: skip
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert events[0].output_format == "jpeg" and decoded(events[0].b64_json).size
    assert decoded(events[1].b64_json).shape == (32, 48, 3)


def test_a_stream_tells_its_failure(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="told to fail"):
        list(client.images.edit(image=("a.png", photo(1)), prompt="fail", stream=True))


def test_a_reader_who_leaves_a_stream_cancels_its_job(client: openai.OpenAI, server: RunningServer) -> None:
    with client.images.with_streaming_response.generate(
        prompt="slowly", stream=True, extra_body={"num_inference_steps": 100}
    ) as answer:
        assert answer.status_code == 200
    (job,) = server.get("/jobs", params={"model": "paint", "limit": 1}).json()["jobs"]
    assert server.wait_job(job["id"])["state"] == "cancelled"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == OFFERED.split(",")
    assert client.models.retrieve("paint").owned_by == "imagepool"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("pain")
    assert missing.value.code == "model_not_found"


def test_errors_are_those_of_the_client_s_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(prompt="x", size="9999")  # type: ignore[call-overload]
    assert wrong.value.param == "size" and wrong.value.type == "invalid_request_error"
    assert wrong.value.response.headers["x-request-id"] == wrong.value.request_id
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'colour'"):
        client.images.generate(prompt="x", extra_body={"colour": 1})
    with pytest.raises(openai.BadRequestError, match="no image") as broken:
        client.images.edit(image=("a.png", b"no image"), prompt="x")
    assert broken.value.param == "image"
    with pytest.raises(openai.InternalServerError, match="told to fail") as failed:
        client.images.generate(prompt="fail")
    assert failed.value.type == "server_error" and failed.value.response.headers["x-should-retry"] == "false"


