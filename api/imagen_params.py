"""The parameters of the imagen API and what our models make of them.

That service ran diffusion models. Where the operator names one (`drawn_by`), it gets the words and numbers that the
service gave its own. Otherwise ours are classical, and a diffusion word becomes the nearest thing that a classical
model has: inference steps are rounds of refinement, guidance is how strongly the effect is applied. A prompt is read by
`core.recipe`: words about sharpness steer the model's own sharpening (see `stress`), other edits are made as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import UploadFile
from pydantic import BaseModel, Field, model_validator

from api.choice import check
from api.fields import Real, Whole
from core.model import MAX_TEXT, ModelSpec
from core.recipe import find_operations, named

ENHANCE_PROMPT = "high quality, detailed, sharp"
DETAIL: Mapping[str, float] = {"sharpen": 1.0, "smooth": -1.0, "soft": -1.0, "blur": -1.0}
"""How words about sharpness speak for (above 0) or against detail."""

WORDED = ("prompt", "negative_prompt")
Prompt = Annotated[str, Field(max_length=MAX_TEXT)]


class Params(BaseModel):
    """A number that is sent empty counts as not sent, in the query as in a form."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value != "" or name in WORDED}


class UpscaleParams(Params):
    prompt: Prompt = Field("", description="Edits to make on the way, such as `sharp` or `warmer`.")
    negative_prompt: Prompt = Field("", description="What to avoid, such as `blurry`; edits named here are left out.")
    num_inference_steps: Whole = Field(20, ge=1, le=100, description="Rounds of refinement.")
    guidance_scale: Real = Field(7.5, ge=1, le=20, description="How steep edges become.")
    scale: Whole = Field(4, description="2 or 4 times the width and height.")


class EnhanceParams(Params):
    prompt: Prompt = Field(ENHANCE_PROMPT, description="What to stress, and edits to make on the way.")
    strength: Real = Field(0.3, ge=0.1, le=1.0, description="How far the image may change.")
    guidance_scale: Real = Field(7.5, ge=1, le=20, description="How strongly detail is raised.")


class StyleParams(Params):
    prompt: Prompt = Field("", description="Edits that the style is combined with, such as `black and white`.")
    strength: Real = Field(0.6, ge=0.1, le=1.0, description="How far the image may change.")
    guidance_scale: Real = Field(8.0, ge=1, le=20, description="Weight of the lines, or of grain and scratches.")


class Upload(BaseModel):
    file: UploadFile = Field(description="An image of 32 to 8192 pixels a side.")


class UpscaleForm(UpscaleParams, Upload):
    """A file, and parameters that win over the query's."""


class EnhanceForm(EnhanceParams, Upload):
    """A file, and parameters that win over the query's."""


class StyleForm(StyleParams, Upload):
    """A file, and parameters that win over the query's."""


class PlainForm(Upload):
    """A file."""


def merge(query: BaseModel, form: BaseModel) -> dict[str, Any]:
    """All parameters: the form's, else the query's, else the defaults."""
    given = query.model_dump(exclude_unset=True) | form.model_dump(exclude_unset=True, exclude={"file"})
    return query.model_dump() | given


def stress(prompt: str, negative: str = "") -> float:
    """The factor by which a prompt wants more (up to 4) or less (down to 1/4) detail; 1 when it says nothing of it."""
    wanted = sum(DETAIL.get(step.name, 0.0) * step.params["strength"] for step in find_operations(prompt))
    avoided = sum(DETAIL.get(name, 0.0) for name in named(negative))
    return float(2.0 ** min(2.0, max(-2.0, wanted - avoided)))


def _upscale(asked: Mapping[str, Any]) -> dict[str, Any]:
    sharpness = 0.5 * asked["guidance_scale"] / 7.5 * stress(asked["prompt"], asked["negative_prompt"])
    return {
        "scale": asked["scale"],
        "steps": asked["num_inference_steps"],
        "sharpness": min(2.0, sharpness),
        "prompt": asked["prompt"],
        "negative_prompt": asked["negative_prompt"],
    }


def _enhance(asked: Mapping[str, Any]) -> dict[str, Any]:
    guidance = asked["guidance_scale"] * stress(asked["prompt"]) / stress(ENHANCE_PROMPT)
    return {
        "prompt": asked["prompt"],
        "strength": asked["strength"],
        "guidance": min(20.0, max(1.0, guidance)),
    }


def _style(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": asked["prompt"], "strength": asked["strength"], "guidance": asked["guidance_scale"]}


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of job: the service's name of it, our model, and how parameters are handed on."""

    type: str
    model: str
    params: Callable[[Mapping[str, Any]], dict[str, Any]]


UPSCALE = Operation("upscale", "upscale", _upscale)
ENHANCE = Operation("enhance", "enhance", _enhance)
COMIC = Operation("style-comic", "style_comic", _style)
AGED = Operation("style-aged", "style_aged", _style)
BACKGROUND = Operation("background-remove", "background_remove", lambda _: {})


@dataclass(frozen=True, slots=True)
class Words:
    """What the service told its diffusion model beside the client's prompt."""

    prompt: str
    negative_prompt: str
    steps: int


DRAWN: Mapping[str, Words] = {
    "enhance": Words("", "", 20),  # its default prompt stands in `EnhanceParams`
    "style_comic": Words("ghibli style, comic, cartoon, vibrant colors", "", 30),
    "style_aged": Words(
        "aged photograph, vintage, sepia tones, old photo, faded colors, film grain, nostalgic",
        "modern, digital, sharp, vibrant colors", 30,
    ),
}  # fmt: skip


def drawn_by(operation: Operation, spec: ModelSpec) -> Operation:
    """The operation, done by a diffusion model: the client's prompt, then the style's own words."""
    words = DRAWN[operation.model]

    def params(asked: Mapping[str, Any]) -> dict[str, Any]:
        prompt = ", ".join(filter(None, (asked["prompt"].strip(), words.prompt)))
        usual = {"negative_prompt": words.negative_prompt, "steps": words.steps, "guidance": asked["guidance_scale"]}
        return check(spec, {"prompt": prompt, "strength": asked["strength"]}, usual)

    return replace(operation, model=spec.name, params=params)
