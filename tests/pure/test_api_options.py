"""Options of a request, and the small readers of headers."""

from __future__ import annotations

from typing import Any

import pytest

from api.auth import ANONYMOUS, Caller
from api.options import FIELDS, Options, read_options
from core.errors import BadRequest, InvalidParameter
from core.model import Catalogue, read_spec
from core.request import OutputFormat, Priority
from engine.build import BUILT_IN

SPEC = read_spec(
    'adapter = "a:B"\ntask = "stub"\n'
    '[params.strength]\ntype = "float"\ndefault = 0.5\nmin = 0\nmax = 1\n'
    '[params.seed]\ntype = "int"\ndefault = 0\nmin = 0\nmax = 4294967295\n'
    '[params.prompt]\ntype = "string"\ndefault = ""\n'
    '[params.lora_name]\ntype = "string"\ndefault = ""\n[params.lora_weight]\ntype = "string"\ndefault = "1"\n',
    "toy",
)

NO_LORAS = {"lora_name": "", "lora_weight": "1"}


def read(**fields: Any) -> Options:
    return read_options(SPEC, Caller(), fields)


def test_parameters_may_come_alone_in_an_object_or_in_its_text() -> None:
    whole = {"strength": 0.25, "seed": 7, "prompt": "", **NO_LORAS}
    assert read(strength="0.25", seed="7").params == whole
    assert read(params={"strength": 0.25, "seed": 7}).params == whole
    assert read(params='{"strength": 0.25}', seed=7).params == whole
    assert read().params == {"strength": 0.5, "seed": 0, "prompt": "", **NO_LORAS}


def test_options_are_read() -> None:
    options = read(priority="urgent", deadline="2.5", format="JPG", quality="80")
    assert options == Options(read().params, OutputFormat("jpeg", 80), Priority.URGENT, 2.5)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"strenght": 1}, "did you mean 'strength'"),
        ({"formt": "png"}, "did you mean 'format'"),
        ({"zzz": 1}, "takes strength, seed, prompt"),
        ({"params": {"sead": 1}}, "did you mean 'seed'"),
        ({"params": {"seed": 1}, "seed": 1}, "twice"),
        ({"params": [1]}, "object"),
        ({"params": "3"}, "object"),
        ({"seed": 2**70}, "from 0 to"),
        ({"seed": "1e9x1"}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"strength": "NaN"}, "a number"),
        ({"strength": "inf"}, "a number"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": "a" * 1_000_000}, "characters"),
        ({"prompt": 5}, "text"),
        ({"format": "gif"}, "format must be"),
        ({"format": 3}, "format must be"),
        ({"quality": 0}, "quality"),
        ({"quality": 101}, "quality"),
        ({"quality": 80.5}, "whole"),
        ({"quality": "x"}, "quality"),
        ({"quality": True}, "quality"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": "-1"}, "deadline"),
        ({"deadline": "nan"}, "deadline"),
        ({"deadline": 10**400}, "deadline"),
        ({"deadline": [1]}, "deadline"),
        ({"priority": 4}, "priority"),
        ({"priority": "asap"}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": [0]}, "priority"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidParameter, match=word):
        read(**fields)


def test_params_as_broken_text_is_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        read(params="{")


@pytest.mark.parametrize(("word", "priority"), [("0", 0), (1, 1), ("Normal", 2), ("P3", 3), ("", 2), (None, 2)])
def test_priorities_have_numbers_and_names(word: Any, priority: int) -> None:
    assert read(priority=word).priority == priority


def test_a_key_may_not_ask_for_more_than_its_ceiling() -> None:
    paid = Caller("acme", "pro", Priority.PAID, Priority.PAID)
    assert read_options(SPEC, paid, {}).priority is Priority.PAID
    assert read_options(SPEC, paid, {"priority": "test"}).priority is Priority.TEST
    with pytest.raises(InvalidParameter, match="'paid' at most"):
        read_options(SPEC, paid, {"priority": 0})


@pytest.mark.parametrize(("names", "weights", "about"), [
    ("a,b,c,d", "1", "the most is 3"), ("../a", "1", "a LoRA's name"), ("a", "2.5", "from 0 to 2"),
    ("a", "nan", "from 0 to 2"), ("a,b", "1,1,1", "3 weights for 2 LoRAs"), ("a,a", "1", "twice"),
])
def test_loras_that_no_model_could_take_are_refused_at_once(names: str, weights: str, about: str) -> None:
    with pytest.raises(InvalidParameter, match=about):
        read(lora_name=names, lora_weight=weights)
    assert read(lora_name="a,b, c", lora_weight="0.5,1,2").params["lora_name"] == "a,b, c"


ODD = ["٢", "²", "𝟐", "2_0", " 2 ", "2\n", "0x2", "nan", "inf", "-Infinity", "1,5", "", "+", ".", "1e", "2 0", "２"]


@pytest.mark.parametrize("odd", ODD)
def test_only_plain_numbers_are_numbers(odd: str) -> None:
    for name, kind in (("seed", "a whole number"), ("strength", "a number")):
        with pytest.raises(InvalidParameter, match=kind):
            SPEC.params[name].check(odd)
    for name in ("quality", "deadline") if odd else ():
        with pytest.raises(InvalidParameter, match=name):
            read(**{name: odd})


@pytest.mark.parametrize("plain", ["0.5", ".5", "5e-1", "1", "1.", 1, 0.5, "+0.5"])
def test_plain_numbers_are_read(plain: Any) -> None:
    assert SPEC.params["strength"].check(plain) == float(plain)


def test_the_quality_of_the_file_and_the_rounds_of_inpaint_can_both_be_said() -> None:
    spec = Catalogue.read([BUILT_IN])["inpaint"]
    both = read_options(spec, ANONYMOUS, {"quality": 80, "rounds": 4, "format": "jpeg"})
    assert (both.params["rounds"], both.output.quality) == (4, 80)
    old = read_options(spec, ANONYMOUS, {"quality": 80, "params": {"quality": 4}, "format": "jpeg"})
    assert (old.params, old.output) == (both.params, both.output), "its older name"
    with pytest.raises(InvalidParameter, match="twice"):
        read_options(spec, ANONYMOUS, {"params": {"quality": 4, "rounds": 4}})


def test_no_parameter_of_ours_hides_behind_an_option() -> None:
    for spec in Catalogue.read([BUILT_IN]):
        assert not set(spec.params) & set(FIELDS), spec.name
