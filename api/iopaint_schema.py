"""What IOPaint's clients send and are told: fields, defaults and ranges of IOPaint 1.6, and as lenient. Unknown names
are ignored (its own page misspells two), "20" is 20; refused are values out of range, and null for what has a default.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from api import strict_json
from api.errors import HttpError, RequestTimeout, ValidationFailed, does_not_fit
from api.pictures import Picture
from api.troubles import raises
from core.errors import BadRequest, TooLarge
from core.model import ModelSpec

SAMPLERS = (
    "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE", "DPM++ 2M SDE Karras", "DPM++ SDE", "DPM++ SDE Karras", "DPM2",
    "DPM2 Karras", "DPM2 a", "DPM2 a Karras", "Euler", "Euler a", "Heun", "LMS", "LMS Karras", "DDIM", "PNDM", "UniPC",
    "LCM",
)  # fmt: skip
LONG = ("image", "mask", "paint_by_example_example_image", "image_tensor_b64", "mask_tensor_b64")  # may be images
MASK_THRESHOLD = 127
RANDOM_SEEDS = (1, 99_999_999)
ONLY_WITH = {  # the strategy that a field belongs to
    "hd_strategy_crop_trigger_size": "Crop", "hd_strategy_crop_margin": "Crop", "hd_strategy_resize_limit": "Resize",
}  # fmt: skip


class Refused(HttpError):
    """What IOPaint refuses by an HTTPException of its own."""


class Lenient(BaseModel):
    """A JSON body."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


Body = TypeVar("Body", bound=Lenient)


def read(kind: type[Body], data: bytes) -> Body:
    """A short JSON text as this kind. Raises `ValidationFailed` with FastAPI's list of what does not fit."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as fault:
        raise does_not_fit(fault) from None


async def read_body(kind: type[Body], body: AsyncIterator[bytes]) -> Body:
    """A JSON body of any length as this kind. Raises as `read`, and `TooLarge`."""
    try:
        return kind.model_validate(await strict_json.read(body, LONG, lenient=True))
    except ValidationError as fault:
        raise does_not_fit(fault) from None
    except (TooLarge, RequestTimeout):
        raise
    except BadRequest as fault:
        errors = [{"loc": ("body",), "msg": fault.message, "type": "json_invalid"}]
        raise ValidationFailed(fault.message, errors=errors) from None


class InpaintRequest(Lenient):
    """The body of `POST /api/v1/inpaint`. What belongs to diffusion models has no effect on the others."""

    image: Picture | None = Field(None, description="base64 or a data: URL: PNG, JPEG, WebP or AVIF.")
    mask: Picture | None = Field(
        None, description="As `image`; brighter than 127 is painted over. Its alpha is ignored."
    )
    ldm_steps: int = 20
    ldm_sampler: str = "plms"
    zits_wireframe: bool = True
    hd_strategy: str = Field("Crop", description="Crop, Resize or Original (so is every other word).")
    hd_strategy_crop_trigger_size: int = Field(800, description="Crop: only images with a longer side are cropped.")
    hd_strategy_crop_margin: int = Field(128, description="Crop: pixels around each hole that are looked at.")
    hd_strategy_resize_limit: int = Field(1280, description="Resize: the longest side that is inpainted.")
    prompt: str = ""
    negative_prompt: str = ""
    use_croper: bool = False
    croper_x: int = 0
    croper_y: int = 0
    croper_height: int = 512
    croper_width: int = 512
    use_extender: bool = False
    extender_x: int = 0
    extender_y: int = 0
    extender_height: int = 640
    extender_width: int = 640
    sd_scale: float = Field(1.0, gt=0, le=1)
    sd_mask_blur: int = 11
    sd_strength: float = Field(1.0, le=1)
    sd_steps: int = 50
    sd_guidance_scale: float = 7.5
    sd_sampler: str = "UniPC"
    sd_seed: int = Field(42, description="-1: one is drawn from 1 to 99999999. X-Seed tells it.")
    sd_match_histograms: bool = False
    sd_outpainting_softness: float = 20.0
    sd_outpainting_space: float = 20.0
    sd_lcm_lora: bool = False
    sd_keep_unmasked_area: bool = Field(True, description="Keep every byte outside the mask.")
    cv2_flag: Literal["INPAINT_NS", "INPAINT_TELEA"] = "INPAINT_NS"
    cv2_radius: int = 4
    paint_by_example_example_image: Picture | None = None
    p2p_image_guidance_scale: float = 1.5
    enable_controlnet: bool = False
    controlnet_conditioning_scale: float = Field(0.4, ge=0, le=1)
    controlnet_method: str = "lllyasviel/control_v11p_sd15_canny"
    enable_brushnet: bool = False
    brushnet_method: str = "Sanster/brushnet_random_mask"
    brushnet_conditioning_scale: float = Field(1.0, ge=0, le=1)
    enable_powerpaint_v2: bool = False
    powerpaint_task: Literal["text-guided", "context-aware", "shape-guided", "object-remove", "outpainting"] = (
        "text-guided"
    )
    fitting_degree: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _settle(self) -> InpaintRequest:
        """Draw the seed, and let one of two features win that exclude each other."""
        if self.sd_seed == -1:
            self.sd_seed = random.randint(*RANDOM_SEEDS)
        if self.use_extender:
            self.sd_strength = 1.0
            if self.enable_controlnet:
                self.controlnet_conditioning_scale = 0.0
        if self.enable_brushnet:
            self.enable_controlnet = self.sd_lcm_lora = False
        return self

    def take(self, name: Literal["image", "mask"]) -> Picture | None:
        """The text of an image, which is not kept for longer than it takes to decode it."""
        text: Picture | None = getattr(self, name)
        setattr(self, name, None)
        return text

    def params_for(self, spec: ModelSpec) -> dict[str, Any]:
        """The model's parameters, as they were sent: those that it names as IOPaint does, the seed, and the brightness
        above which a mask is on. What the strategy does not look at is left out: there anything may stand."""
        known: dict[str, Any] = {**dict(self), "seed": self.sd_seed, "mask_threshold": MASK_THRESHOLD}
        return {
            name: known[name] for name in spec.params
            if name in known and ONLY_WITH.get(name, self.hd_strategy) == self.hd_strategy
        }  # fmt: skip


class AdjustMask(Lenient):
    mask: Picture = Field(description="base64 or a data: URL; from 127 on a pixel is on.")
    operate: Literal["expand", "shrink", "reverse"]
    kernel_size: int = Field(5, ge=0, le=100, description="Pixels by which the mask grows or shrinks.")


class RunPlugin(Lenient):
    name: str
    image: Picture = Field(description="base64 or a data: URL.")
    clicks: list[list[int]] = Field(
        [], max_length=1_000, description="For interactive segmentation, which is not offered."
    )
    scale: float = Field(2.0, description="RealESRGAN: 2 or 4.")


class SwitchModel(Lenient):
    name: str


class SwitchPluginModel(Lenient):
    plugin_name: str
    model_name: str


class GenInfo(BaseModel):
    """What a diffusion program wrote into its PNG."""

    prompt: str = ""
    negative_prompt: str = ""


class ModelInfo(BaseModel):
    """A model as IOPaint tells of it."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    path: str
    model_type: str = "inpaint"
    is_single_file_diffusers: bool = False
    need_prompt: bool = False
    controlnets: list[str] = []
    brushnets: list[str] = []
    support_strength: bool = False
    support_outpainting: bool = False
    support_lcm_lora: bool = False
    support_controlnet: bool = False
    support_brushnet: bool = False
    support_powerpaint_v2: bool = False

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelInfo:
        """An erase model."""
        return cls(name=spec.name, path=spec.name)


class PluginInfo(BaseModel):
    name: str
    support_gen_image: bool
    support_gen_mask: bool


class ServerConfig(BaseModel):
    """What the page asks for first."""

    plugins: list[PluginInfo]
    modelInfos: list[ModelInfo]
    removeBGModel: str
    removeBGModels: list[str]
    realesrganModel: str
    realesrganModels: list[str]
    interactiveSegModel: str = ""
    interactiveSegModels: list[str] = []
    enableFileManager: bool = False
    enableAutoSaving: bool = False
    enableControlnet: bool = False
    controlnetMethod: str | None = None
    disableModelSwitch: bool = False
    isDesktop: bool = False
    samplers: list[str] = list(SAMPLERS)


class Fault(BaseModel):
    """Every error of this API."""

    error: str = Field(description="The kind of error.")
    detail: str | list[dict[str, Any]]
    body: str = ""
    errors: str = Field(description="The sentence that IOPaint's page shows.")


def takes(kind: type[Lenient], *marks: str) -> dict[str, Any]:
    """The description of a JSON body. `marks`: as `api.troubles.raises` has them."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}, **raises(*marks)}


def answers(*media_types: str, **more: Any) -> dict[int | str, dict[str, Any]]:
    """The description of the answers: bytes of these types, and what is special about the errors."""
    told: dict[int | str, dict[str, Any]] = {
        status: {"description": about}
        for status, about in (
            (400, "No image, or image and mask do not match."), (415, "An image of a kind that is not served."),
        )
    }  # fmt: skip
    if media_types:
        told[200] = {"description": "The image.", "content": {kind: {} for kind in media_types}, **more}
    return told
