"""What the doctor looks at that only the door knows: whether the keys are such as it takes."""

from __future__ import annotations

from collections.abc import Iterator

from api.auth import read_keys
from core.settings import Settings
from engine.doctor import Check, Finding


def key_entries(settings: Settings) -> Iterator[Finding]:
    """The entries of the keys file, where there is one that can be read at all."""
    if settings.keys_file is None:
        return
    try:
        callers = [caller for _, caller in read_keys(settings.keys_file.read_text(encoding="utf-8")).values()]
    except OSError:  # told by the doctor's own check
        return
    except ValueError as fault:
        yield Finding("✗", str(fault), "mend it; docs/api.md shows one")
        return
    for tier in sorted({caller.tier for caller in callers} - {"", *settings.tiers}):
        yield Finding("!", f"the keys file names the tier '{tier}', which there is not: its keys have no limits",
                      f"name one of {', '.join(settings.tiers)}, or set it with --tiers")  # fmt: skip
    if callers:
        yield Finding("✓", f"{len(callers)} keys in force, of {len({caller.tenant for caller in callers})} tenants")
    else:
        yield Finding("!", "the keys file has no key in force: everybody is refused", "add one; docs/api.md shows how")


CHECKS: tuple[Check, ...] = (key_entries,)
