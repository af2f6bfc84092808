"""What libraries say goes on to clients without what is none of their business."""

from __future__ import annotations

import pytest

from core.hearsay import MOST, hearsay


@pytest.mark.parametrize(
    ("said", "passed_on"),
    [
        ("`height` and `width` have to be divisible by 8 but are 65 and 64.", None),
        ("no file named config.json found in directory /home/me/models/tiny.", "no file named config.json found in "
         "directory 'tiny'"),
        ("cannot read '/home/me/a.bin'", "cannot read 'a.bin'"),
        ("at ~/.cache/huggingface/hub/models--a--b, offline", "at 'models--a--b', offline"),
        (r"in C:\Users\me\x.safetensors", "in 'x.safetensors'"),
        ("see ../models/x/y", "see 'y'"),
        ("either strength and/or guidance", None),
        ("see https://huggingface.co/docs/x for more", None),
        ("a ratio of 1/2/3 and 16/9", None),
        ("<object Thing at 0x7f3acafe0010> is none", "<object Thing> is none"),
        ("first\nsecond /tmp/x/y", "first"),
        ("  \n", "ValueError"),
        ("a  b\tc", "a b c"),
    ],
)
def test_of_a_message_only_what_helps_is_passed_on(said: str, passed_on: str | None) -> None:
    assert hearsay(ValueError(said)) == (said if passed_on is None else passed_on)


def test_it_is_of_bounded_length() -> None:
    told = hearsay(ValueError("word " * 1000))
    assert len(told) <= MOST + 4 and told.endswith("word ...")
    assert len(hearsay(ValueError("x" * 10_000))) <= MOST + 4


def test_a_hostile_message_takes_no_time() -> None:
    assert hearsay(ValueError("/a" * 20_000 + "!" + "\\" * 20_000))
