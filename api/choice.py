"""Which model serves a request of a dialect that need not name one, and what of its words that model understands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from core.errors import InvalidParameter, UnknownModel
from core.model import Catalogue, ModelSpec, Param
from core.request import ROLES, Role

SIZE = ("width", "height")
_LETTERS = re.compile(r"[^a-z0-9+]")


def choose(
    catalogue: Catalogue, tasks: Sequence[str], images: Mapping[Role, int], first: Sequence[str | None] = (),
    params: Collection[str] = (),
) -> ModelSpec:
    """The model for a request with so many images of each role that asks for the parameters `params`: the first of the
    names in `first` that is offered and takes them; else a stepped model of these tasks, the tasks in their order; else
    any other. Raises `UnknownModel`."""
    named = [catalogue[name] for name in first if name and name in catalogue]
    by_task = [spec for task in tasks for spec in catalogue if spec.task == task]
    for spec in (*named, *sorted(by_task, key=lambda spec: not spec.stepped)):
        if takes(spec, images) and spec.params.keys() >= set(params):
            return spec
    sent = " and ".join(f"{count} as {role}" for role, count in images.items() if count) or "none"
    needs = f" and the parameters {', '.join(params)}" if params else ""
    raise UnknownModel(
        f"this server offers no model to {' or '.join(tasks)} with the images sent ({sent}){needs}; GET /models lists "
        "what it has, and its operator adds others (--models-folder)"
    )


def takes(spec: ModelSpec, images: Mapping[Role, int]) -> bool:
    """Whether the model takes exactly so many images of each role."""
    return all(
        least <= images.get(role, 0) <= most
        for role in ROLES
        for least, most in [spec.parts.get(role, (0, 0))]
    )


def named(catalogue: Catalogue, name: str) -> ModelSpec:
    """A model by a name of which only letters, digits and + count: "SD1.5" finds "sd15". Raises `UnknownModel`."""
    alike = [spec for spec in catalogue if _plain(spec.name) == _plain(name)]
    return alike[0] if alike and name not in catalogue else catalogue[name]


def check(spec: ModelSpec, asked: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters: those `asked` for, which the model must have; the `usual` ones of the dialect, of which it takes
    what it has, brought within its range; its own defaults. None counts as not given. Raises `InvalidParameter`."""
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in usual.items():
        param = spec.params.get(name)
        if param is not None and name not in given and (fits := _fitted(param, value)) is not None:
            given[name] = fits
    return spec.check_params(given)


@contextmanager
def in_their_words(names: Mapping[str, str]) -> Iterator[None]:
    """Tell a parameter that does not fit by the name that the dialect has for it (`names`, by the model's). Width and
    height keep theirs in the sentence, where a dialect has one field for the two."""
    try:
        yield
    except InvalidParameter as fault:
        own = str(fault.details.get("parameter"))
        if own not in names:
            raise
        message = fault.message if own in SIZE else fault.message.replace(f"'{own}'", f"'{names[own]}'")
        raise InvalidParameter(message, **{**fault.details, "parameter": names[own]}) from None


def sampler(spec: ModelSpec, name: str) -> str:
    """The model's own spelling of a sampler's name: "dpmpp_2m_karras" and "DPM++ 2M Karras" are the same. Raises
    `InvalidParameter` when it has none of that name."""
    param = spec.params.get("scheduler")
    choices = [str(choice) for choice in param.choices] if param else []
    if param is None or not choices:
        return name
    for choice in choices:
        if _plain(choice) == _plain(name):
            return choice
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(filter(None, choices))}"
    raise InvalidParameter(f"model '{spec.name}' has no sampler '{name[:64]}'; {hint}", parameter="sampler")


def _plain(name: str) -> str:
    return _LETTERS.sub("", name.lower().replace("dpmpp", "dpm++"))


def _fitted(param: Param, value: Any) -> Any:
    """A usual value within the parameter's range; None when the model cannot take it."""
    if value is None or (param.choices and value not in param.choices):
        return None
    if isinstance(value, str):
        return value
    value = value if param.min is None else max(param.min, value)
    return value if param.max is None else min(param.max, value)
