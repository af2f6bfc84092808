"""The options of a request, whatever carried them (JSON, form fields, a query): model parameters and how to run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api import strict_json
from api.auth import Caller, read_priority
from core import loras
from core.errors import InvalidParameter
from core.model import FALSE, TRUE, ModelSpec
from core.numbers import is_number
from core.request import OutputFormat, Priority

FORMATS = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp", "avif": "avif"}
OPTIONS = ("params", "priority", "deadline", "format", "quality")
FIELDS = ("model", "image", "mask", *OPTIONS)
MAX_DEADLINE = 7 * 86_400.0
LOSSLESS = OutputFormat()


@dataclass(frozen=True, slots=True)
class Options:
    """`params` are complete and checked; `deadline` in seconds from now, None when none was given."""

    params: Mapping[str, Any]
    output: OutputFormat
    priority: Priority
    deadline: float | None


def read_options(spec: ModelSpec, caller: Caller, fields: Mapping[str, Any]) -> Options:
    """Options from fields: those of `OPTIONS`, and single parameters of the model beside or instead of `params` (an
    object, or its JSON as text). Raises `InvalidParameter` (an unknown name with the one that was probably meant)."""
    if not fields:
        return Options(spec.check_params({}), LOSSLESS, caller.priority, None)
    given = _params(fields.get("params"))
    for name, value in fields.items():
        if name in OPTIONS:
            continue
        if name not in spec.params:
            raise _unknown(spec, name)
        if name in given:
            raise InvalidParameter(f"'{name}' is given twice, alone and in 'params'", parameter=name)
        given[name] = value
    params = spec.check_params(given)
    if params.get("lora_name"):  # now, not by a job that fails later; whether there is such a LoRA the worker says
        loras.wanted(params["lora_name"], params.get("lora_weight"))
    return Options(
        params=params,
        output=_output(fields),
        priority=caller.grant(read_priority(fields.get("priority"))),
        deadline=_deadline(fields.get("deadline")),
    )


def single(name: str, value: Any, fields: Mapping[str, Any]) -> Any:
    """The value of a field that may be given once. Raises `InvalidParameter` for a second one."""
    if name in fields:
        raise InvalidParameter(f"'{name[:64]}' is given twice", parameter=name[:64])
    return value


def read_flag(name: str, value: Any) -> bool:
    """A yes or no, in JSON or as the text of a form; no when it is not given. Raises `InvalidParameter`."""
    word = "false" if value is None or value == "" else str(value).strip().lower()
    if word not in TRUE | FALSE:
        raise InvalidParameter(f"{name} must be true or false", parameter=name)
    return word in TRUE


def _params(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = strict_json.loads(value.encode("utf-8", "surrogatepass")) if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidParameter("'params' must be a JSON object of the model's parameters", parameter="params")
    return dict(value)


def _unknown(spec: ModelSpec, name: str) -> InvalidParameter:
    near = difflib.get_close_matches(name[:64], (*FIELDS, *spec.params), n=1)
    takes = f"model '{spec.name}' takes {', '.join(spec.params) or 'no parameter'}"
    hint = f"did you mean '{near[0]}'?" if near else takes
    return InvalidParameter(f"there is no field '{name[:64]}'; {hint}", parameter=name[:64])


def _output(fields: Mapping[str, Any]) -> OutputFormat:
    word = fields.get("format")
    name = FORMATS.get(word.strip().lower()) if isinstance(word, str) else "png" if word is None else None
    if name is None:
        raise InvalidParameter(f"format must be one of {', '.join(FORMATS)}", parameter="format")
    quality = _number(fields.get("quality"), "quality", 1, 100)
    if quality is not None and quality != int(quality):
        raise InvalidParameter("quality must be a whole number from 1 to 100", parameter="quality")
    return OutputFormat(name, None if quality is None else int(quality))  # type: ignore[arg-type]


def _deadline(value: Any) -> float | None:
    return _number(value, "deadline", 0.001, MAX_DEADLINE)


def _number(value: Any, name: str, low: float, high: float) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value) if is_number(value) else math.nan
    except OverflowError:
        number = math.nan
    if not low <= number <= high:
        raise InvalidParameter(f"{name} must be a number from {low:g} to {high:g}", parameter=name)
    return number
