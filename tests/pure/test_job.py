"""A job's id."""

from __future__ import annotations

import uuid

from core.job import new_id


def test_an_id_is_a_random_uuid_as_uuid4_makes_them() -> None:
    made = [new_id() for _ in range(200)]
    assert len(set(made)) == 200
    for text in made:
        found = uuid.UUID(text)
        assert str(found) == text and found.version == 4 and found.variant == uuid.RFC_4122
