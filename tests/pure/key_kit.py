"""A keys file for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

KEY, OTHER_KEY = "key-of-acme", "key-of-zenith"


def keys_file(folder: Path, tier: str = "", priority: str = "normal") -> Path:
    """Two tenants with a key each; the first one's has this tier and priority."""
    first, second = (hashlib.sha256(key.encode()).hexdigest() for key in (KEY, OTHER_KEY))
    file = folder / "keys.toml"
    file.write_text(
        f'[[keys]]\nsha256 = "{first}"\ntenant = "acme"\ntier = "{tier}"\npriority = "{priority}"\n'
        f'[[keys]]\nsha256 = "{second}"\ntenant = "zenith"\n'
    )
    return file
