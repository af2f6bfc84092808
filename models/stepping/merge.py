"""Merge tables: how calls of one network become one forward, and one answer becomes many.

One small table per network class says what happens to each argument (`columns.py`). Nothing here is about pipelines:
whatever calls a `UNet2DConditionModel` is merged by that class's table. A class without a table works all the same,
one call at a time.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.stepping.columns import (
    Alone,
    Column,
    Levelled,
    OnePerSample,
    OneShape,
    Plain,
    Private,
    Samples,
    Shared,
    Text,
    frozen,
)
from models.stepping.contract import Lane, StepCall

if TYPE_CHECKING:
    from models.stepping.compiled import CompiledForward

TEXT_MULTIPLE = 64  # tokens, to which padded text is rounded up where row counts are fixed too

Arguments = dict[str, Any]


def _as_they_are(calls: list[Arguments], rows: Sequence[int], multiple: int) -> None:
    pass


def _as_it_is(answer: Any, arguments: Arguments) -> Any:
    return answer


@dataclass(frozen=True, slots=True)
class Table:
    """How calls of one method of one class are merged. `rows`: the argument whose first dimension counts samples.

    `level` makes the calls' arguments alike before they are joined; `finish` does to each call's own rows of the
    answer what could not be done in the forward. Arguments without a column are plain data that must be equal.
    """

    rows: str
    columns: Mapping[str, Column]
    level: Callable[[list[Arguments], Sequence[int], int], None] = _as_they_are
    finish: Callable[[Any, Arguments], Any] = _as_it_is


# --- what the tables need beyond columns ----------------------------------------------------------------------------


def _no_control_is_zero(calls: list[Arguments], rows: Sequence[int], multiple: int) -> None:
    """Rows without a ControlNet get residuals of zero where others have some: to add nothing is exact."""
    for name in ("down_block_additional_residuals", "mid_block_additional_residual"):
        pattern = next((call[name] for call in calls if name in call), None)
        for call, count in zip(calls, rows, strict=True):
            if pattern is not None and name not in call:
                call[name] = _zeros(pattern, count)


def _zeros(pattern: Any, rows: int) -> Any:
    if isinstance(pattern, Tensor):
        return pattern.new_zeros((rows, *pattern.shape[1:]))
    return tuple(_zeros(part, rows) for part in pattern)


def _scale_later(calls: list[Arguments], rows: Sequence[int], multiple: int) -> None:
    """The forward is run at scale 1; each call's own scale is laid on its rows afterwards, as the network would."""
    for call in calls:
        call["conditioning_scale"] = 1.0


def _scale(answer: Any, arguments: Arguments) -> Any:
    scale = arguments.get("conditioning_scale", 1.0)
    return answer if scale == 1.0 else each_tensor(answer, lambda tensor: tensor * scale)


def _pad_text(calls: list[Arguments], rows: Sequence[int], multiple: int) -> None:
    """Text of different length is padded at its end and masked: without its mask the padding would be read."""
    texts = [call["encoder_hidden_states"] for call in calls]
    longest = max(text.shape[1] for text in texts)
    longest = -(-longest // multiple) * multiple
    masks = [call.get("encoder_hidden_states_mask") for call in calls]
    if all(mask is None for mask in masks) and all(text.shape[1] == longest for text in texts):
        return
    for call, text, mask in zip(calls, texts, masks, strict=True):
        missing = longest - text.shape[1]
        known = text.new_ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        call["encoder_hidden_states"] = nn.functional.pad(text, (0, 0, 0, missing))
        call["encoder_hidden_states_mask"] = nn.functional.pad(known, (0, missing), value=False)


# --- the tables -----------------------------------------------------------------------------------------------------

_SAMPLES, _ONE_EACH, _SHARED = Samples(), OnePerSample(), Shared()

_UNET_INPUTS: Mapping[str, Column] = {
    "sample": _SAMPLES, "timestep": _ONE_EACH, "encoder_hidden_states": _SAMPLES, "class_labels": _SAMPLES,
    "timestep_cond": _SAMPLES, "attention_mask": _SAMPLES, "encoder_attention_mask": _SAMPLES,
    "added_cond_kwargs": _SAMPLES,
}
_TRANSFORMER_INPUTS: Mapping[str, Column] = {
    "hidden_states": _SAMPLES, "encoder_hidden_states": _SAMPLES, "timestep": _ONE_EACH, "guidance": _ONE_EACH,
    "img_ids": _SHARED, "txt_ids": _SHARED, "controlnet_block_samples": _SAMPLES,
}
_TEXT = Table("input_ids", {"input_ids": _SAMPLES, "attention_mask": _SAMPLES, "position_ids": Private()})
_DECODER = Table("z", {"z": _SAMPLES, "generator": Plain()})

TABLES: Mapping[tuple[str, str], Table] = {
    ("UNet2DConditionModel", "forward"): Table("sample", {
        **_UNET_INPUTS, "down_intrablock_additional_residuals": _SAMPLES,
        "down_block_additional_residuals": Levelled(), "mid_block_additional_residual": Levelled(),
    }, level=_no_control_is_zero),
    ("ControlNetModel", "forward"): Table("sample", {
        **_UNET_INPUTS, "controlnet_cond": _SAMPLES, "conditioning_scale": Plain(), "guess_mode": Private(),
    }, level=_scale_later, finish=_scale),
    ("FluxTransformer2DModel", "forward"): Table("hidden_states", {
        **_TRANSFORMER_INPUTS, "pooled_projections": _SAMPLES, "controlnet_single_block_samples": _SAMPLES,
    }),
    ("Flux2Transformer2DModel", "forward"): Table("hidden_states", {
        **_TRANSFORMER_INPUTS, "kv_cache": Private(), "kv_cache_mode": Private(),
    }),
    ("QwenImageTransformer2DModel", "forward"): Table("hidden_states", {
        **_TRANSFORMER_INPUTS, "encoder_hidden_states": Text(), "encoder_hidden_states_mask": Levelled(),
        "img_shapes": OneShape(), "additional_t_cond": _SAMPLES,
    }, level=_pad_text),
    ("CLIPTextModel", "forward"): _TEXT,
    ("CLIPTextModelWithProjection", "forward"): _TEXT,
    ("T5EncoderModel", "forward"): _TEXT,
    ("AutoencoderKL", "decode"): _DECODER,
    ("AutoencoderKLFlux2", "decode"): _DECODER,
    ("AutoencoderKLQwenImage", "decode"): _DECODER,
}


# --- one network ----------------------------------------------------------------------------------------------------


class _ByItself(tuple[Any, ...]):
    """The key of calls that are not merged; equal for calls that cost the same."""


def merges(call: StepCall) -> bool:
    """Whether the call can become one forward with others of its key."""
    return not isinstance(call.key, _ByItself)


def set_apart(call: StepCall, what: Hashable) -> None:
    """Have the call share forwards only with those that were set apart for the same."""
    assert isinstance(call.key, tuple)
    call.key = type(call.key)((*call.key, what))


class MergedNetwork:
    """One method of one module on the device, whose calls are merged by its class's table if it has one.

    `row_sizes`: every forward has one of these numbers of rows (filled up with copies of its last row; beyond the
    largest, a multiple of it), and padded text a multiple of 64 tokens. For a fixed number of rows a row's bits do not
    depend on its companions, so one size makes a request's image the same to the last bit whatever it shares with;
    several sizes make that cheaper and less strict, and give compiled forwards their shapes. Empty: no filling.
    `compiled`: the module's compiled forward, for denoisers; it needs row sizes.
    """

    def __init__(
        self, name: str, module: nn.Module, lane: Lane, method: str = "forward", row_sizes: Sequence[int] = (),
        compiled: CompiledForward | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self._lane = lane
        self._method = getattr(module, method) if method != "forward" else module
        self._parameters = tuple(inspect.signature(getattr(type(module), method)).parameters)[1:]
        self._table = TABLES.get((type(module).__name__, method))
        self._sizes = sorted(row_sizes) if lane is Lane.DENOISE else []
        self._compiled = compiled if self._sizes else None
        if row_sizes and lane is not Lane.DENOISE:
            self._table = None  # other companies would mean other bits
        if self._table is None and lane is Lane.DENOISE:
            kind = type(module).__name__
            print(f"{name}: {kind} has no merge table; its forwards run one at a time", file=sys.stderr)

    def call(self, args: tuple[Any, ...], kwargs: Arguments) -> StepCall:
        """What a run that calls the module like this waits for."""
        if self._table is not None:
            named = dict(zip(self._parameters, args, strict=False)) | kwargs
            try:
                rows = _rows(named.get(self._table.rows))
                return StepCall(self, (), named, rows, (self, self._key(self._table, named, rows)), self._lane)
            except Alone:
                args, kwargs = (), named
        shapes = [tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        rows = next((shape[0] for shape in shapes if shape), 1)
        return StepCall(self, args, kwargs, rows, _ByItself((self, *shapes)), self._lane)

    def _key(self, table: Table, named: Arguments, rows: int) -> frozenset[Any]:
        """What the arguments' columns demand. Raises `Alone`."""
        parts: list[tuple[str, Any]] = []
        for name, value in named.items():
            if value is None:
                continue
            column = table.columns.get(name)
            part = frozen(value) if column is None else column.key(value, rows)
            if self._sizes and isinstance(column, Text):
                part = part, -(-value.shape[1] // TEXT_MULTIPLE)  # else the padding would depend on the company
            if part is not None:
                parts.append((name, part))
        return frozenset(parts)

    def forward(self, calls: Sequence[StepCall]) -> list[Any]:
        """One forward of calls of one key; one after the other, if they cannot be merged (their key is for measuring
        what they cost). A single call is passed on untouched, unless rows are filled up."""
        table = self._table
        if table is None or not merges(calls[0]) or (len(calls) == 1 and not self._sizes):
            return [self._method(*call.args, **call.kwargs) for call in calls]
        rows = [call.rows for call in calls]
        named = [{name: value for name, value in call.kwargs.items() if value is not None} for call in calls]
        table.level(named, rows, TEXT_MULTIPLE if self._sizes else 1)
        extra = self._missing(sum(rows))
        filling = _last(table, named[-1]) if extra else {}
        joined = self._joined(table, named + [filling] * extra, rows + [1] * extra)
        if self._compiled is not None and self.compilable(calls):
            answer = self._compiled(joined)
        else:
            answer = self._method(**joined)
        total = sum(rows) + extra
        places = [slice(end - count, end) for end, count in zip(accumulate(rows), rows, strict=True)]
        return [
            table.finish(each_tensor(answer, partial(_cut, place, total)), call.kwargs)
            for place, call in zip(places, calls, strict=True)
        ]

    def compilable(self, calls: Sequence[StepCall]) -> bool:
        """Whether the module as it was compiled answers these calls; for who changes it for some of them."""
        return True

    def prepare(self, call: StepCall, tell: Callable[[str], None], tokens: Sequence[int] = ()) -> None:
        """Compile for calls like this one, at each of the row sizes and, where text is padded, for texts of up to so
        many `tokens` too. `tell` is told what is about to be compiled: each takes seconds to minutes."""
        if self._compiled is None or self._table is None or isinstance(call.key, _ByItself):
            return
        named = {name: value for name, value in call.kwargs.items() if value is not None}
        padded = any(isinstance(column, Text) for column in self._table.columns.values())
        for longest in sorted({TEXT_MULTIPLE, *tokens}) if padded else [TEXT_MULTIPLE]:
            one = [dict(named)]
            self._table.level(one, [call.rows], longest)
            last = _last(self._table, one[0])
            for rows in self._sizes:
                tell(f"compiling {self.name} for {rows} rows")
                if not self._compiled.prepare(self._joined(self._table, [last] * rows, [1] * rows)):
                    break  # more rows would not do either

    def _joined(self, table: Table, named: list[Arguments], rows: list[int]) -> Arguments:
        device = named[0][table.rows].device
        return {
            name: _column(table, name).join([one.get(name) for one in named], rows, device) for name in named[0]
        }

    def _missing(self, rows: int) -> int:
        """How many rows are to be filled up."""
        if not self._sizes:
            return 0
        fitting = next((size for size in self._sizes if size >= rows), None)
        return fitting - rows if fitting else -rows % self._sizes[-1]


def _rows(samples: Any) -> int:
    """How many samples a call carries. Raises `Alone` if it does not say so where such calls do."""
    if not isinstance(samples, Tensor) or not samples.ndim:
        raise Alone
    return len(samples)


_PLAIN = Plain()


def _column(table: Table, name: str) -> Column:
    return table.columns.get(name, _PLAIN)


def _last(table: Table, named: Arguments) -> Arguments:
    """The arguments of the call's last sample, as of a call of its own."""
    return {name: _column(table, name).last(value) for name, value in named.items()}


def _cut(place: slice, total: int, tensor: Tensor) -> Tensor:
    if not tensor.ndim or len(tensor) != total:
        raise ValueError(f"an answer of shape {tuple(tensor.shape)} has not one entry for each of {total} rows")
    return tensor[place]


def each_tensor(answer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The answer with each of its tensors changed; tuples, lists and the libraries' output classes are kept."""
    if isinstance(answer, Tensor):
        return change(answer)
    if isinstance(answer, (tuple, list)):
        return type(answer)([each_tensor(part, change) for part in answer])
    if isinstance(answer, dict):  # diffusers' and transformers' outputs are dictionaries too
        return type(answer)(**{name: each_tensor(part, change) for name, part in answer.items()})
    return answer
