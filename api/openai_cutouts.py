"""`background="transparent"`: the image is drawn as any other, then a second job cuts its subject out.

None of our models draws alpha, so what is behind the subject is drawn and taken away. The first image stays in memory.
"""

from __future__ import annotations

from dataclasses import replace

from api.choice import choose
from api.images import read_image
from core.data import Data
from core.errors import InvalidParameter, UnknownModel
from core.job import Job
from core.model import Catalogue, ModelSpec
from core.request import ImageRequest, OutputFormat, unseen
from engine.engine import Engine

REMOVE = "background_remove"
FORMATS = ("png", "webp")  # what can hold alpha
PIXELS_OF_A_BYTE = 8_192  # more than any PNG packs into one


def remover(catalogue: Catalogue, format: str) -> ModelSpec:
    """The model that cuts out. Raises `InvalidParameter` for a format without alpha, or when there is none."""
    if format not in FORMATS:
        raise InvalidParameter(
            f"Transparent backgrounds need output_format {' or '.join(FORMATS)}, not {format}.", parameter="background"
        )
    try:
        return choose(catalogue, (REMOVE,), {"image": 1}, (REMOVE,))
    except UnknownModel:
        raise InvalidParameter(
            f"Transparent backgrounds need a model that cuts subjects out ({REMOVE}), and this server offers none; "
            "leave 'background' out.", parameter="background"
        ) from None


def check_size(wanted: ImageRequest, drawer: ModelSpec, remover: ModelSpec) -> None:
    """Raise `TooLarge` or `InvalidParameter` before anything is drawn that could not be cut out."""
    drawer.check_size(wanted.frame, wanted.params, "png")
    drawn = unseen(*drawer.canvas(wanted.frame, wanted.params))
    remover.check_size(drawn, remover.check_params({}), wanted.output.format)


def first(request: ImageRequest) -> ImageRequest:
    """The request for the image that is to be cut out: without loss."""
    return replace(request, output=OutputFormat("png"))


def second(wanted: ImageRequest, spec: ModelSpec, image: Data) -> ImageRequest:
    """The job after it: cuts the subject out of the image, in the format that was wanted."""
    part = read_image(image, max_pixels=len(image) * PIXELS_OF_A_BYTE)  # made here: no stranger's bomb
    return replace(wanted, model=spec.name, images=(part,), params=spec.check_params({}), previews=False)


async def cut_out(engine: Engine, wanted: ImageRequest, spec: ModelSpec, image: Data) -> tuple[Job, Data]:
    """Run that job while its client waits; the image. Cancelling this coroutine cancels the job."""
    job, body = await engine.run(replace(second(wanted, spec, image), durable=False))
    return job, await body.read()
