"""Images as clients send them: base64 of all tastes, masks of the wrong size."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from api.images import check_mask, decode_base64, read_image
from core.errors import ImagePoolError, InvalidImage, InvalidParameter, TooLarge, UnsupportedEncoding
from core.header import ImageHeader
from core.request import ImagePart

DATA = bytes(range(256)) + b"\xfb\xff\xfe"
TEXT = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        "\r\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76)) + "\n",
        f"  {TEXT}  ",
        f"data:image/png;base64,{TEXT}",
        f" DATA:image/jpeg;name=a.jpg;BASE64,{TEXT}",
    ],
)
def test_base64_of_every_taste_is_read(text: str) -> None:
    assert decode_base64(text) == DATA
    assert decode_base64(text.encode()) == DATA


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("!!!!", InvalidImage),
        ("abcde", InvalidImage),
        ("a=bc", InvalidImage),
        ("bäh", InvalidImage),
        ("data:text/html;base64,PGI+", UnsupportedEncoding),
        ("data:image/png,%89PNG", UnsupportedEncoding),
        ("data:image/png;base64", UnsupportedEncoding),
        ("data:;base64,AAAA", UnsupportedEncoding),
    ],
)
def test_what_is_no_base64_image_is_refused(text: str, error: type[ImagePoolError]) -> None:
    with pytest.raises(error) as caught:
        decode_base64(text, "mask")
    assert caught.value.details["parameter"] == "mask"


def test_base64_beyond_the_limit_is_refused_before_it_is_decoded() -> None:
    assert decode_base64(base64.b64encode(bytes(1000)), max_bytes=1000) == bytes(1000)
    assert decode_base64(b"\n" * 5000 + base64.b64encode(bytes(1000)), max_bytes=1000) == bytes(1000)
    with pytest.raises(TooLarge):
        decode_base64(base64.b64encode(bytes(1005)), max_bytes=1000)


def part(width: int, height: int, orientation: int = 1) -> ImagePart:
    return ImagePart("image", b"", ImageHeader("png", width, height, orientation), 0)


def test_a_mask_is_measured_upright() -> None:
    image, mask = part(30, 20, orientation=6), replace(part(20, 30), role="mask")
    check_mask(image, mask)
    check_mask(image, None)
    with pytest.raises(InvalidParameter, match="the mask is 30x20 but the image is 20x30"):
        check_mask(image, part(30, 20))


def test_an_empty_image_is_told_by_its_role() -> None:
    with pytest.raises(InvalidImage, match="the mask is empty"):
        read_image(b"", "mask")
