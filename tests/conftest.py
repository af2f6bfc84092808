"""Fixtures that every test has; helper modules of a folder can be imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent, HERE / "pure", HERE / "process"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
