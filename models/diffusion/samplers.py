"""Samplers by the names that people know, as diffusers' scheduler classes.

A sampler is made from the configuration of the model's own scheduler: noise schedule and kind of prediction belong to
the model, only the way to walk back is chosen. Models of flow matching (Flux, Qwen-Image, SD 3) need samplers of their
own, whose steps the pipeline itself lays out; one that draws noise at each step (LCM) is not among them, since their
pipelines would draw it from torch's global state, whatever the seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from core.errors import InvalidParameter

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    ),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
FLOW_SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Euler Karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
}
TWO_FORWARDS = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}  # for each step


def names(scheduler: Any) -> list[str]:
    """The samplers that a model with this scheduler of its own can be asked for."""
    return list(_table(scheduler))


def make(name: str, scheduler: Any) -> Any:
    """A new scheduler of that sampler for the model whose own one is given. Empty: None, the model's own. Case, blanks
    and marks do not matter, and a class's name does as well. Raises `InvalidParameter` with the names there are."""
    if not _plain(name):
        return None
    import diffusers

    for known, (kind, changes) in _table(scheduler).items():
        if _plain(name) in (_plain(known), _plain(kind)):
            return getattr(diffusers, kind).from_config(scheduler.config, **changes)
    raise InvalidParameter(
        f"this model has no sampler '{name[:64]}'; it has {', '.join(names(scheduler))}", parameter="scheduler"
    )


def forwards(steps: int, scheduler: Any) -> int:
    """How many forwards of the denoiser so many steps take."""
    return 2 * steps - 1 if type(scheduler).__name__ in TWO_FORWARDS else steps


def _table(scheduler: Any) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    flow = type(scheduler).__name__.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False)
    return FLOW_SAMPLERS if flow else SAMPLERS


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.replace("++", "pp").lower()).removesuffix("scheduler")
