"""The server's secret, made once and kept beside its jobs, so that what was signed before a restart still holds."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from core.errors import StorageFailed
from core.signing import SECRET_BYTES
from store.faults import disk_faults

NAME = ".secret"


def kept(root: Path) -> bytes:
    """The secret of this outputs folder, made if it has none. Raises `StorageFailed`, `StorageFull`. Call it with the
    folder locked."""
    file = root / NAME
    with disk_faults():
        if file.exists():
            return read(file)
        made, part = secrets.token_bytes(SECRET_BYTES), root / f"{NAME}.part"
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
            out.write(made.hex().encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
        return made


def read(file: Path) -> bytes:
    """A secret from a file: 64 hex digits or more, or any text of 32 bytes or more. Raises `StorageFailed`."""
    try:
        text = file.read_bytes().strip()
    except OSError as fault:
        why = (fault.strerror or "unknown fault").lower()
        raise StorageFailed(f"the secret {file.name} cannot be read ({why}); see --url-secret") from None
    try:
        found = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        found = text
    if len(found) < SECRET_BYTES:
        raise StorageFailed(
            f"the secret {file.name} has {len(found)} bytes, and {SECRET_BYTES} are needed; write new ones "
            "(openssl rand -hex 32), or remove the file where the server has made it"
        )
    return found
