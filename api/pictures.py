"""An image within a JSON body, as a field of a pydantic model: a text, or a long string that stays in pieces."""

from __future__ import annotations

from typing import Annotated

from pydantic import InstanceOf, WithJsonSchema

from api.json_pieces import LongText

Picture = Annotated[str | InstanceOf[LongText], WithJsonSchema({"type": "string"})]
