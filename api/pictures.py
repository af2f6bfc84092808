"""An image within a JSON body, as a field of a pydantic model: a text, or a long string that stays in pieces."""

from __future__ import annotations

from typing import Annotated

from pydantic import GetPydanticSchema
from pydantic_core import core_schema

from api.json_pieces import LongText

Picture = Annotated[
    str | LongText,
    GetPydanticSchema(
        lambda _, __: core_schema.union_schema([core_schema.str_schema(), core_schema.is_instance_schema(LongText)]),
        lambda _, describe: describe(core_schema.str_schema()),
    ),
]
