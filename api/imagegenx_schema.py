"""What ImageGenX's clients send, both spellings of what has two, and what our models make of it."""

from __future__ import annotations

import base64
import re
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from api import choice
from api.errors import does_not_fit
from api.images import decode_base64, read_image
from api.pictures import Picture
from core import loras
from core.errors import InvalidParameter
from core.model import ModelSpec
from core.request import Corner, OutputFormat, Watermark

RESOLUTION = re.compile(r"\s*([1-9][0-9]{0,4})\s*[×xX*]\s*([1-9][0-9]{0,4})\s*")
LONG = ("image_url", "mask_url", "control_image_url")  # whose texts may be images
MOST_TEXTS = 100
MOST_MARK = 256 << 10  # bytes of a watermark's image
MOST_MARK_PIXELS = 4_000_000  # so many bytes can hold far more
USUAL = {"steps": 50, "guidance": 7.5, "true_cfg_scale": 7.5}
SIDE, SAMPLER = 512, "Euler"
THEIR_WORDS = {
    "prompt": "text", "guidance": "cfg_scale", "true_cfg_scale": "cfg_scale", "scheduler": "sampler",
    "width": "resolution", "height": "resolution",
}  # fmt: skip


class Lenient(BaseModel):
    """A JSON object, of which unknown names and nulls are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """null says nothing, wherever it stands."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class Mark(Lenient):
    """A watermark."""

    enable: bool = True
    type: Literal["text", "image"] = "text"
    text: str = Field("", max_length=200)
    image_path: str = Field("", description="The image itself, as base64 or a data: URL; paths are not read.")
    font: str = Field("", max_length=64, description="Name of a font file of the server's host, without its ending.")
    font_size: int = Field(24, ge=4, le=512)
    color: str = Field("#FFFFFF", pattern="^#[0-9A-Fa-f]{6}$")
    position: str = Field("bottom-right", description="top-left, ..., or center; `_` and blanks are taken for `-`.")
    transparency: float = Field(0.5, ge=0, le=1, description="How opaque it is, as this API has always meant it.")
    margin: int = Field(20, ge=0, le=4096)
    scale: float = Field(0.15, gt=0, le=1, description="An image's width, as a part of the result's.")

    @field_validator("position")
    @classmethod
    def _corner(cls, position: str) -> str:
        corner = re.sub(r"[ _]", "-", position.strip().lower()).replace("centre", "center")
        if corner not in Corner.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"must be one of {', '.join(Corner.__args__)}")  # type: ignore[attr-defined]
        return corner

    def read(self) -> Watermark | None:
        """None when it is not enabled. Raises `InvalidParameter`, `InvalidImage` or `TooLarge`."""
        if not self.enable:
            return None
        image = ""
        if self.type == "image":
            data = decode_base64(self.image_path, max_bytes=MOST_MARK)
            read_image(data, max_pixels=MOST_MARK_PIXELS)
            image = base64.b64encode(data).decode()
        elif not self.text.strip():
            raise InvalidParameter("a watermark needs a text", parameter="watermark.text")
        return Watermark(
            self.text.strip(), image, self.position, self.transparency, self.margin, self.font, self.font_size,  # type: ignore[arg-type]
            self.color, self.scale,
        )  # fmt: skip


class Postprocess(Lenient):
    """What is done with the image that the model made."""

    super_resolution: Literal["2x", "4x", "none", ""] | None = None
    watermark: Mark | None = None
    format: Literal["webp", "png", "jpg", "jpeg"] = "webp"

    @property
    def scale(self) -> int:
        """How many times larger the image becomes."""
        return int((self.super_resolution or "1x")[0]) if self.super_resolution not in ("none", "", None) else 1

    def output(self) -> OutputFormat:
        """How the last image is encoded."""
        kind = "jpeg" if self.format in ("jpg", "jpeg") else self.format
        return OutputFormat(kind, watermark=self.watermark.read() if self.watermark else None)  # type: ignore[arg-type]


class Params(Lenient):
    """How the image is made. What is left out has this API's defaults, within the model's range."""

    resolution: str | None = Field(None, description="512×512 when there is no image; x, X and * are taken as well.")
    style: str | None = Field(None, max_length=200, description="Added to the text.")
    steps: int | None = Field(None, description="50 when left out.")
    cfg_scale: float | None = Field(None, description="7.5 when left out.")
    sampler: str | None = Field(None, max_length=64, description="Euler when left out and the model has it.")
    lora_name: str | None = None
    lora_weight: float | None = Field(None, ge=0, le=2, description="1.0 when left out.")
    negative_prompt: str | None = None
    seed: int | None = None
    strength: float | None = Field(None, ge=0, le=1)
    postprocess: Postprocess = Field(
        default_factory=Postprocess, validation_alias=AliasChoices("postprocess", "post_process")
    )

    @field_validator("resolution")
    @classmethod
    def _readable(cls, resolution: str | None) -> str | None:
        if resolution is not None and not RESOLUTION.fullmatch(resolution):
            raise ValueError("must be width and height, as in 1024×1024")
        return resolution

    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels."""
        found = RESOLUTION.fullmatch(self.resolution or "")
        return (int(found[1]), int(found[2])) if found else None


class Task(Lenient):
    """What all requests may have. `resolution`, `style` and `strength` may stand in `params` or beside it."""

    params: Params = Field(default_factory=lambda: read(Params, {}))
    resolution: str | None = None
    style: str | None = None
    strength: float | None = None
    callback_url: str | None = None
    priority: int | None = Field(None, ge=0, le=3, description="1 is P1, for those who pay.")
    model_type: str | None = Field(None, max_length=128, description="A model's name.")

    def all_params(self) -> Params:
        """`params` with what stands beside them."""
        beside = {name: getattr(self, name) for name in ("resolution", "style", "strength")}
        given = {name: value for name, value in beside.items() if value is not None}
        return read(Params, self.params.model_dump() | given) if given else self.params


class Generate(Task):
    """An image from words."""

    text: str = Field(max_length=8_000)


class Img2img(Generate):
    """An image made of another."""

    image_url: Picture = Field(
        description="A data: URL, base64, an http(s) address, or an original_url of this server."
    )
    strength: float | None = Field(None, ge=0, le=1, description="How far the image may change.")


class Inpaint(Img2img):
    """What a mask covers is drawn anew."""

    mask_url: Picture = Field(description="As image_url: white, or transparent, is drawn anew.")
    inpaint_area: Any = Field(None, description="Has no effect: the mask says it.")


class Control(Generate):
    """An image that follows another one's lines, depth or pose."""

    image_url: Picture | None = Field(None, description="The image whose edges are found, for canny.")
    control_image_url: Picture | None = Field(None, description="The map itself.")
    control_type: Literal["canny", "depth", "openpose"] = "canny"


class Batch(Task):
    """Many images from as many texts."""

    texts: list[str] = Field(min_length=1, max_length=MOST_TEXTS)
    batch_size: int | None = Field(None, ge=1, description="Has no effect: the server forms batches by itself.")


Body = TypeVar("Body", bound=Lenient)


def read(kind: type[Body], given: Any) -> Body:
    """A parsed JSON body as this kind. Raises `ValidationFailed`."""
    try:
        return kind.model_validate(given)
    except ValidationError as fault:
        raise does_not_fit(fault) from None


def model_params(spec: ModelSpec, text: str, params: Params, drawn: bool, **more: Any) -> dict[str, Any]:
    """The model's parameters. `drawn`: from words alone, so that the size is not an image's; `more`: further ones that
    were asked for. Raises `InvalidParameter`."""
    words = ", ".join(part.strip() for part in (text, params.style or "") if part.strip())
    if not words:
        raise InvalidParameter("'text' is empty; say what to draw", parameter="text")
    loras.wanted(params.lora_name, params.lora_weight)  # here rather than in a task that fails later
    size = params.size() or ((SIDE, SIDE) if drawn else None)
    asked = {
        "prompt": words,
        "negative_prompt": params.negative_prompt,
        "steps": params.steps,
        ("guidance" if "guidance" in spec.params else "true_cfg_scale"): params.cfg_scale,
        "scheduler": choice.sampler(spec, params.sampler) if params.sampler else None,
        "lora_name": params.lora_name,
        "lora_weight": _weight(params.lora_weight) if params.lora_name else None,
        "seed": params.seed,
        "strength": params.strength,
        **(dict(zip(("width", "height"), size, strict=True)) if size and params.resolution else {}),
        **more,
    }
    usual = USUAL | {"scheduler": SAMPLER} | ({"width": size[0], "height": size[1]} if size else {})
    with choice.in_their_words(THEIR_WORDS):
        return choice.check(spec, asked, usual)


def _weight(weight: float | None) -> str:
    return str(1.0 if weight is None else weight)
