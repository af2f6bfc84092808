"""What the master knows about a model: its spec, read from one TOML file. Importing a spec never imports torch."""

from __future__ import annotations

import difflib
import math
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from core.errors import InvalidParameter, TooLarge, UnknownModel
from core.header import NAMES, WRITTEN_SIDE, ImageFormat
from core.numbers import is_number
from core.recipe import read_recipe
from core.request import ROLES, ImagePart
from core.ticket import Group
from core.weights import Weights, why_unusable

ParamType = Literal["int", "float", "bool", "string", "recipe"]
PARAM_TYPES: Mapping[str, type] = {"int": int, "float": float, "bool": bool, "string": str, "recipe": str}
TRUE, FALSE = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off"})
WORDS: Mapping[str, tuple[str, Any]] = {
    "str": ("text", str), "int": ("a whole number", int), "float": ("a number", (int, float)),
    "bool": ("true or false", bool),
}  # fmt: skip
REFERENCE_SIDE = 512
REFERENCE_PIXELS = REFERENCE_SIDE * REFERENCE_SIDE
MAX_TEXT = 8_192
MAX_RECIPE = 2_048  # it is read word by word where requests are taken, and that is to take no time
_HALF = re.compile("[\ud800-\udfff]")
RANDOM_SEED = -1
MAX_IMAGES = 16  # of one role in a request


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a model. `group`: the network takes it once per batch, so it is part of the group. `formerly`:
    an older name, under which it is still taken.

    A `recipe` is a prompt that must be readable by `core.recipe`, of at most `MAX_RECIPE` characters; a string has at
    most `MAX_TEXT`. An int fits 64 bits, signed or not: answers and seeds go no further.
    """

    name: str
    type: ParamType
    default: Any = None
    required: bool = False
    min: float | None = None
    max: float | None = None
    choices: tuple[Any, ...] = ()
    group: bool = False
    description: str = ""
    formerly: str = ""

    def check(self, value: Any) -> Any:
        """The value as this parameter's type (numbers may come as strings, from forms). Raises `InvalidParameter`."""
        value = self._convert(value)
        if self.choices and value not in self.choices:
            raise self._refuse(f"must be one of {', '.join(map(str, self.choices))}")
        if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
            raise self._refuse(f"must be {self.range_text()}")
        if self.type == "int" and not -(2**63) <= value < 2**64:
            raise self._refuse("must fit 64 bits")
        if self.type == "recipe":
            read_recipe(value)
        return value

    def range_text(self) -> str:
        """The allowed range in words."""
        if self.min is not None and self.max is not None:
            return f"from {_show(self.min)} to {_show(self.max)}"
        return f"at least {_show(self.min)}" if self.min is not None else f"at most {_show(self.max)}"

    def _convert(self, value: Any) -> Any:
        if self.type in ("string", "recipe"):
            return self._text(value)
        if self.type == "bool":
            word = str(value).strip().lower()
            if word not in TRUE | FALSE:
                raise self._refuse("must be true or false")
            return word in TRUE
        if not is_number(value):
            raise self._refuse(f"must be {'a whole number' if self.type == 'int' else 'a number'}")
        try:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number if self.type == "float" else int(value) if float(int(value)) == number else _not_whole()
        except (ValueError, OverflowError):
            raise self._refuse(f"must be {'a whole number' if self.type == 'int' else 'a number'}") from None

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self._refuse("must be text")
        most = MAX_RECIPE if self.type == "recipe" else MAX_TEXT
        if len(value) > most:
            raise self._refuse(f"has {len(value)} characters; the most is {most}")
        if "\0" in value or _HALF.search(value):
            raise self._refuse("holds a character that is no text (NUL or half of a surrogate pair)")
        return value.strip()

    def _refuse(self, why: str) -> InvalidParameter:
        return InvalidParameter(f"parameter '{self.name}' {why}", parameter=self.name)


def _not_whole() -> int:
    raise ValueError


def _show(bound: float | None) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model as the master sees it.

    name, version, task: what clients call it and what it does (inpaint, edit, upscale, enhance, background_remove,
    style, stub). adapter: `module:Class`, imported in the worker only. options: handed to the adapter's constructor.
    max_batch: the most items of one batch at any size. timeout: seconds one batch may run; then it is ended where
    its model passes checkpoints, and else its worker counts as hung. pad: heights and widths are padded up to a
    multiple of it inside the adapter. needs_mask: takes image + mask.
    raw: the adapter gets and gives encoded bytes (no codec runs). work: cost relative to other models. scale_param:
    the parameter by which width and height grow. max_output_pixels: a request for a larger result is refused; the
    server's own bound may be lower. preload: loaded before the
    worker says it is ready (the others load at their first batch). mixed_sizes: the adapter takes images of different
    sizes in one batch. weights: the file without which the model is not offered.
    takes: by role, the least and the most images of a request, where that is not one image (and one mask with
    `needs_mask`). stepped: its runs share forwards step by step, and a job joins those that run; timeout then bounds
    one forward. steps_param: the parameter that counts a job's steps. side: of a result, in pixels, for which neither
    an image nor the parameters `height` and `width` say how large it is.
    """

    name: str
    adapter: str
    task: str
    version: str = "1"
    description: str = ""
    method: str = ""
    max_batch: int = 16
    timeout: float = 120.0
    pad: int = 1
    needs_mask: bool = False
    raw: bool = False
    work: float = 1.0
    scale_param: str | None = None
    max_output_pixels: int = 1 << 30
    preload: bool = True
    mixed_sizes: bool = False
    weights: Weights | None = None
    takes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    stepped: bool = False
    steps_param: str | None = None
    side: int = REFERENCE_SIDE
    params: Mapping[str, Param] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def check_params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, defaults filled in. Raises `InvalidParameter` for one that is unknown, missing or bad."""
        if not given.keys() <= self.params.keys():
            given = self._renamed(given)
        checked: dict[str, Any] = {}
        for name, param in self.params.items():
            if given.get(name) is not None:
                checked[name] = param.check(given[name])
            elif param.required:
                raise InvalidParameter(f"parameter '{name}' is required by model '{self.name}'", parameter=name)
            else:
                checked[name] = param.default
        return checked

    def _renamed(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the names of today; raises `InvalidParameter` for one that never was."""
        today = {param.formerly: name for name, param in self.params.items() if param.formerly}
        named: dict[str, Any] = {}
        for old, value in given.items():
            name = old if old in self.params else today.get(old)
            if name is None:
                near = difflib.get_close_matches(old[:64], self.params, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else f"; it takes {', '.join(self.params) or 'none'}"
                raise InvalidParameter(f"model '{self.name}' has no parameter '{old[:64]}'{hint}", parameter=old[:64])
            if name in named:
                raise InvalidParameter(f"'{name}' is given twice, once by its older name", parameter=name)
            named[name] = value
        return named

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """By role, the least and the most images that a request has."""
        usual = {"image": (1, 1)} | ({"mask": (1, 1)} if self.needs_mask else {})
        return usual | {role: (least, most) for role, (least, most) in self.takes.items()}

    def settled(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters with what chance decides decided: a stepped model's seed, where it is `RANDOM_SEED`. Done once
        when a job is accepted, so that one that has to run again gives the same image."""
        if self.stepped and params.get("seed") == RANDOM_SEED:
            return {**params, "seed": secrets.randbits(32)}
        return params

    def scale(self, params: Mapping[str, Any]) -> int:
        """By how much width and height grow."""
        return int(params[self.scale_param]) if self.scale_param else 1

    def lacks(self) -> str | None:
        """What keeps it from being offered, as a sentence with what to do; None: nothing. A model that names its file
        in the option `weights` is left to find out for itself."""
        if self.weights is None or "weights" in self.options:
            return None
        why = why_unusable(self.weights.file())
        return why and f"{why}; fetch them with `python -m models.download {self.name}`"

    def with_weights(self) -> ModelSpec:
        """The spec with the file of its weights in the option `weights`, for the adapter."""
        if self.weights is None or "weights" in self.options:
            return self
        return replace(self, options={**self.options, "weights": str(self.weights.file().resolve())})

    def canvas(self, image: ImagePart | None, params: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the result: what the parameters `height` and `width` say, where the model has them and
        they are not 0; else those of the image, upright, times the scale; else `side`."""
        height, width = int(params.get("height") or 0), int(params.get("width") or 0)
        if image is not None:
            scale = self.scale(params)
            height = height or image.header.upright_height * scale
            width = width or image.header.upright_width * scale
        return height or self.side, width or self.side

    def check_size(self, image: ImagePart | None, params: Mapping[str, Any], format: ImageFormat) -> None:
        """Raise `TooLarge` when the result would have more than `max_output_pixels`, `InvalidParameter` when a file of
        that format cannot hold it."""
        height, width = self.canvas(image, params)
        if max(height, width) > WRITTEN_SIDE[format] and not self.raw:
            holding = [name for name, side in WRITTEN_SIDE.items() if max(height, width) <= side]
            raise InvalidParameter(
                f"the result would have {width} × {height} pixels, and a side of {NAMES[format]} holds at most "
                f"{WRITTEN_SIDE[format]:,}; ask for {f'the format {holding[0]}' if holding else 'a smaller result'}",
                parameter="format", width=width, height=height, max_side=WRITTEN_SIDE[format],
            )  # fmt: skip
        if height * width <= self.max_output_pixels:
            return
        if self.scale(params) > 1:
            cure, parameter = "send a smaller image, or ask for a smaller " + str(self.scale_param), self.scale_param
        elif params.get("width") or params.get("height"):
            cure, parameter = "ask for a smaller width and height", "width"
        else:
            cure, parameter = "send a smaller image", "image"
        raise TooLarge(
            f"the result would have {width} × {height} = {width * height:,} pixels; model '{self.name}' gives at most "
            f"{self.max_output_pixels:,}, {cure}",
            parameter=parameter, width=width, height=height, pixels=width * height,
            max_output_pixels=self.max_output_pixels,
        )  # fmt: skip

    def group(
        self, image: ImagePart | None, params: Mapping[str, Any], caps: Sequence[tuple[int, int]]
    ) -> Group:
        """The group of a job, which may have no image. `caps` are (side, items) pairs, ascending: an image of up to
        side x side pixels may share a batch with at most so many; beyond the last, it runs alone. With `mixed_sizes`
        the group's height and width are the least side that holds the pixels, beyond the last a power of two times it.
        """
        if image is None or self.stepped:
            height, width = self.canvas(image, params)
        else:
            height, width = image.header.upright_height, image.header.upright_width
        height, width = (-(-side // self.pad) * self.pad for side in (height, width))
        cap = next((items for side, items in caps if height * width <= side * side), 1)
        if self.mixed_sizes:
            height = width = _class_side(height * width, caps)
        fixed = tuple((name, params[name]) for name, param in self.params.items() if param.group)
        limit = 1 if self.stepped else max(1, min(self.max_batch, cap))
        return Group(self.name, self.version, height, width, fixed=fixed, limit=limit, stepped=self.stepped)

    def cost(self, image: ImagePart | None, params: Mapping[str, Any]) -> float:
        """Relative work: 1.0 for a 512x512 image on a model of work 1.0, whose work is that of growing twofold and
        of its usual steps. What grows to a width and height counts by its result. A stepped model's `work` is that of
        one step."""
        if image is None or self.stepped:
            height, width = self.canvas(image, params)
            steps = int(params[self.steps_param]) if self.steps_param else 1
            return self.work * max(1, steps) * max(0.05, height * width / REFERENCE_PIXELS)
        pixels = image.header.pixels * max(1.0, self.scale(params) ** 2 / 4)
        if not self.scale_param:
            pixels = max(pixels, math.prod(self.canvas(image, params)))
        return self.work * self._rounds(params) * max(0.05, pixels / REFERENCE_PIXELS)

    def _rounds(self, params: Mapping[str, Any]) -> float:
        """How many times its usual steps a job has."""
        usual = self.params[self.steps_param].default if self.steps_param else None
        return float(params[self.steps_param] / usual) if self.steps_param and usual else 1.0


def _class_side(pixels: int, caps: Sequence[tuple[int, int]]) -> int:
    side = next((side for side, _ in caps if pixels <= side * side), caps[-1][0] if caps else 512)
    while pixels > side * side:
        side *= 2
    return side


def read_spec(text: str, name: str) -> ModelSpec:
    """A spec from the text of its TOML file. Raises ValueError with a sentence that names the file's fault."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise ValueError(f"model '{name}': not readable as TOML: {fault}") from None
    tables = raw.pop("params", {})
    if not isinstance(tables, dict):
        raise ValueError(f"model '{name}': 'params' must be tables, one per parameter: [params.seed]")
    params = {key: _param(name, key, value) for key, value in tables.items()}
    known = set(ModelSpec.__dataclass_fields__) - {"name"}
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"model '{name}': unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else ""))
    for key in ("adapter", "task"):
        if key not in raw:
            raise ValueError(f"model '{name}': the key '{key}' is missing")
    if "weights" in raw:
        try:
            raw["weights"] = Weights.read(raw["weights"])
        except ValueError as fault:
            raise ValueError(f"model '{name}': {fault}") from None
    spec = ModelSpec(**{"name": name, **raw, "params": params})
    _check(spec)
    return spec


def _check(spec: ModelSpec) -> None:
    for field_ in fields(spec):
        word, types = WORDS.get(str(field_.type), ("", object))
        value = getattr(spec, field_.name)
        if not isinstance(value, types) or (isinstance(value, bool) and types not in (bool, object)):
            raise ValueError(f"model '{spec.name}': '{field_.name}' must be {word}, not {value!r}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"model '{spec.name}': '{field_.name}' must be above 0")
    if not all(spec.adapter.partition(":")):
        raise ValueError(f"model '{spec.name}': 'adapter' must be module:Class, not '{spec.adapter}'")
    _check_takes(spec)
    steps = spec.params.get(spec.steps_param) if spec.steps_param else None
    if spec.steps_param and (steps is None or steps.type != "int" or not (steps.required or steps.default)):
        raise ValueError(f"model '{spec.name}': 'steps_param' must name a parameter of type int with a default")
    scale = spec.params.get(spec.scale_param) if spec.scale_param else None
    if spec.scale_param and (scale is None or scale.type != "int" or not (scale.required or scale.default)):
        raise ValueError(f"model '{spec.name}': 'scale_param' must name a parameter of type int with a default")


def _check_takes(spec: ModelSpec) -> None:
    wrong = (f"model '{spec.name}': 'takes' must name roles ({', '.join(ROLES)}) with the least and the most images "
             "of each, as in {image = [0, 1]}")
    if not isinstance(spec.takes, Mapping):
        raise ValueError(wrong)
    for role, counts in spec.takes.items():
        whole = isinstance(counts, list) and [type(count) for count in counts] == [int, int]
        if role not in ROLES or not whole or not 0 <= counts[0] <= counts[1] <= MAX_IMAGES:
            raise ValueError(wrong)


def _param(model: str, name: str, raw: Any) -> Param:
    known = set(Param.__dataclass_fields__) - {"name"}
    if not (isinstance(raw, dict) and isinstance(raw.get("type"), str) and isinstance(raw.get("choices", []), list)):
        raise ValueError(f"model '{model}': parameter '{name}' must be a table with a type (and a list of choices)")
    for key in raw:
        if key not in known:
            raise ValueError(f"model '{model}': parameter '{name}': unknown key '{key}'")
    if raw.get("type") not in PARAM_TYPES:
        raise ValueError(f"model '{model}': parameter '{name}': type must be one of {', '.join(PARAM_TYPES)}")
    return Param(name=name, **{**raw, "choices": tuple(raw.get("choices", ()))})


class Catalogue:
    """The models this server offers, by name."""

    def __init__(self, specs: Sequence[ModelSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}

    @classmethod
    def read(cls, folders: Sequence[Path], only: Sequence[str] = ()) -> Catalogue:
        """Every `*.toml` of the folders; a later folder's file replaces an earlier one of the same name. `only` names
        the models to offer, all when empty. Raises ValueError when a file is wrong or a named model is missing."""
        specs: dict[str, ModelSpec] = {}
        for folder in folders:
            for file in sorted(folder.glob("*.toml")):
                try:
                    text = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as fault:
                    raise ValueError(f"model '{file.stem}': its file cannot be read ({type(fault).__name__})") from None
                specs[file.stem] = read_spec(text, file.stem)
        missing = [name for name in only if name not in specs]
        if missing:
            raise ValueError(f"no model file for: {', '.join(missing)} (there are: {', '.join(sorted(specs))})")
        return cls([specs[name] for name in (only or specs)])

    def __getitem__(self, name: str) -> ModelSpec:
        spec = self._specs.get(name)
        if spec is None:
            near = difflib.get_close_matches(name[:64], self._specs, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(sorted(self._specs))}"
            raise UnknownModel(f"there is no model of that name{hint}")
        return spec

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[ModelSpec]:
        return iter(self._specs.values())

    def __len__(self) -> int:
        return len(self._specs)
