"""What every operation answers, to what fits and what does not, is what the description says: schemathesis, in little.

`make proof` runs it for longer, with other seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openapi_kit import Counts, live, run

OFF = {"enabled": False}
AT_BOUNDS = {"coverage": {"enabled": True}, "fuzzing": OFF, "stateful": OFF}
DRAWN = {"coverage": OFF, "fuzzing": {"enabled": True, "generation": {"max-examples": 4}}, "stateful": OFF}


def conforms(folder: Path, keys: bool, phases: dict[str, Any]) -> Counts:
    folder.mkdir()
    with live(folder, keys=keys) as server:
        wrong, told = run(server, seed=1, **phases)
    assert not wrong, "\n\n".join(wrong)
    return told


def deep(told: Counts) -> set[str]:
    """The operations of which at least one request did what it was for."""
    return {label for label, counts in told.items() if any(status[0] == "2" for status in counts)}


@pytest.mark.timeout(400)  # a minute of a core
def test_every_answer_is_one_that_the_description_promises(tmp_path: Path) -> None:
    bounds, drawn = conforms(tmp_path / "open", False, AT_BOUNDS), conforms(tmp_path / "keys", True, DRAWN)
    assert bounds.keys() == drawn.keys() and len(drawn) > 50
    missed = drawn.keys() - deep(bounds) - deep(drawn)
    assert len(missed) < 4, f"requests hardly get beyond the first check of {missed}"
