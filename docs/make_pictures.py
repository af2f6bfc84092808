"""Makes the README's contact sheet from a running server: `python docs/make_pictures.py [URL]`.

A black box, like `test_concurrency.py`: it posts the photographs of `examples/` to `/run/{model}` and lays out what
comes back. Nothing is retouched; what a caption says is what was asked for.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import httpx
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "images" / "readme.jpg"
CELL, CAPTION, GAP, COLUMNS = (300, 200), 24, 8, 4
PAPER, INK = (250, 250, 248), (40, 40, 40)
EYE = (319, 132)  # of the cat, in the photograph's pixels

SHEET: tuple[tuple[str, str | None, dict[str, str], str], ...] = (
    ("rocket", None, {}, "photograph"),
    ("rocket", "inpaint", {}, "inpaint: the rocket is masked"),
    ("rocket", "edit", {"prompt": "a warm sunset"}, "edit: a warm sunset"),
    ("rocket", "style_comic", {"strength": "1.0"}, "style_comic"),
    ("coffee", None, {}, "photograph"),
    ("coffee", "background_remove", {}, "background_remove"),
    ("coffee", "edit", {"prompt": "watercolour"}, "edit: watercolour"),
    ("coffee", "edit", {"prompt": "素描"}, "edit: pencil sketch, asked in Chinese"),
    ("astronaut", None, {}, "photograph"),
    ("astronaut", "edit", {"prompt": "oil painting"}, "edit: oil painting"),
    ("astronaut", "style_aged", {"strength": "1.0"}, "style_aged"),
    ("cat", "upscale", {"scale": "4"}, "upscale 4 times: bicubic | ours"),
)  # fmt: skip


def main(url: str) -> None:
    """Ask for every picture of the sheet and write it."""
    rows = -(-len(SHEET) // COLUMNS)
    width, height = COLUMNS * (CELL[0] + GAP) + GAP, rows * (CELL[1] + CAPTION + GAP) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(sheet), caption_font()
    with httpx.Client(base_url=url, timeout=300) as client:
        for place, (name, model, params, caption) in enumerate(SHEET):
            x = GAP + place % COLUMNS * (CELL[0] + GAP)
            y = GAP + place // COLUMNS * (CELL[1] + CAPTION + GAP)
            sheet.paste(picture(client, name, model, params), (x, y))
            pen.text((x, y + CELL[1] + 4), caption, fill=INK, font=font)
            print(caption)
    sheet.save(TARGET, quality=86, optimize=True)
    print(f"{TARGET.relative_to(ROOT)}: {sheet.size[0]} x {sheet.size[1]}, {TARGET.stat().st_size >> 10} KiB")


def picture(client: httpx.Client, name: str, model: str | None, params: dict[str, str]) -> Image.Image:
    """One cell."""
    photo = ROOT / "examples" / f"{name}.jpg"
    if model is None:
        return fit(Image.open(photo).convert("RGB"))
    files = {"image": photo.read_bytes()}
    if model == "inpaint":
        files["mask"] = (ROOT / "examples" / f"{name}_mask.png").read_bytes()
    answer = client.post(f"/run/{model}", params=params, files=files)
    answer.raise_for_status()
    result = Image.open(io.BytesIO(answer.content))
    if model == "upscale":
        return beside_bicubic(Image.open(photo).convert("RGB"), result.convert("RGB"))
    return fit(on_checks(result) if result.mode == "RGBA" else result.convert("RGB"))


def fit(image: Image.Image) -> Image.Image:
    """Scaled and cut to the cell; what is too high loses its foot."""
    scale = max(CELL[0] / image.width, CELL[1] / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left = (image.width - CELL[0]) // 2
    return image.crop((left, 0, left + CELL[0], CELL[1]))


def on_checks(cut: Image.Image, side: int = 16) -> Image.Image:
    """A picture with alpha on the usual checkerboard."""
    ground = Image.new("RGB", cut.size, (255, 255, 255))
    pen = ImageDraw.Draw(ground)
    for y in range(0, cut.height, side):
        for x in range(y // side % 2 * side, cut.width, 2 * side):
            pen.rectangle((x, y, x + side - 1, y + side - 1), fill=(214, 214, 214))
    ground.paste(cut, mask=cut.getchannel("A"))
    return ground


def beside_bicubic(photo: Image.Image, ours: Image.Image) -> Image.Image:
    """The same detail twice, pixel for pixel: by bicubic interpolation and by ours."""
    scale, half = ours.width // photo.width, CELL[0] // 2 - 1
    left, top = EYE[0] * scale - half // 2, EYE[1] * scale - CELL[1] // 2
    cell = Image.new("RGB", CELL, PAPER)
    for place, image in enumerate((photo.resize(ours.size, Image.Resampling.BICUBIC), ours)):
        cell.paste(image.crop((left, top, left + half, top + CELL[1])), (place * (half + 2), 0))
    return cell


def caption_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own face: the sheet looks the same on every machine."""
    return ImageFont.load_default(15)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000")
