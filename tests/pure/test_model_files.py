"""A model file that is wrong stops the start with one sentence that names the file's fault."""

from __future__ import annotations

import pytest

from core.model import Catalogue, read_spec

HEAD = 'adapter = "models.stub:Stub"\ntask = "stub"\n'


@pytest.mark.parametrize(("text", "about"), [
    ("params = 3", "params"),
    ("[params]\nsteps = 3", "steps"),
    ('[params.steps]\ntype = ["int"]', "steps"),
    ('[params.steps]\ntype = "int"\nchoices = 3', "steps"),
    ('[params.steps]\ntype = "whole"', "steps"),
    ('[params.steps]\ntype = "int"\nhow = 1', "how"),
    ('max_batch = "4"', "max_batch"),
    ("max_batch = 0", "max_batch"),
    ("max_batch = true", "max_batch"),
    ("timeout = -1.0", "timeout"),
    ("pad = 0", "pad"),
    ("raw = 1", "raw"),
    ('scale_param = "factor"', "scale_param"),
    ('scale_param = "factor"\n[params.factor]\ntype = "string"\ndefault = "2"', "scale_param"),
    ('scale_param = "factor"\n[params.factor]\ntype = "int"', "scale_param"),
    ('name = "other"', "name"),
    ("max_bacth = 4", "max_batch"),
    ("this is no TOML", "TOML"),
])
def test_what_is_wrong_is_said_in_one_sentence(text, about):
    with pytest.raises(ValueError, match=about) as refused:
        read_spec(HEAD + text, "mine")
    assert "model 'mine'" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("adapter", ["models.stub", ":Stub", "models.stub:", ""])
def test_an_adapter_is_a_module_and_a_class(adapter):
    with pytest.raises(ValueError, match="adapter"):
        read_spec(f'adapter = "{adapter}"\ntask = "stub"', "mine")


def test_a_right_file_is_read_and_whole_numbers_do_for_seconds():
    text = HEAD + 'timeout = 5\nscale_param = "factor"\n[params.factor]\ntype = "int"\ndefault = 2'
    spec = read_spec(text, "mine")
    assert spec.name == "mine" and spec.timeout == 5 and spec.scale({"factor": 3}) == 3


def test_a_file_that_is_no_text_is_told_too(tmp_path):
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="model 'bad'"):
        Catalogue.read([tmp_path])
