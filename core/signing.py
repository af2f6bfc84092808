"""Addresses that serve without a key, for a while: what an answer links to is often fetched by somebody else.

An address is signed for one path, one tenant and one moment at which it ends. The tenant is not named in it: there is
only a mark that nobody can make or read without the secret. Who can make a signature is the server alone, and it signs
what it answers to the tenant whose it is.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Collection
from urllib.parse import parse_qsl, urlsplit

EXPIRES, HOLDER, SIGNATURE = "expires", "holder", "signature"
MARK = 12  # bytes of a tenant's mark
SECRET_BYTES = 32
LATEST = 1 << 40  # seconds since the epoch; nothing that is signed ends later


class Signer:
    """Signs and checks. `secret`: at least 32 bytes. `clock`: seconds since the epoch."""

    def __init__(self, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        if len(secret) < SECRET_BYTES:
            raise ValueError(f"the secret has {len(secret)} bytes; at least {SECRET_BYTES} are needed")
        self._secret, self._clock = secret, clock
        self._known: Collection[str] = ()
        self._marks: dict[str, str] = {}

    def signed(self, url: str, tenant: str, seconds: float) -> str:
        """The address (whole, or a path), with what lets it serve for so many seconds. It has no query yet."""
        ends = min(int(self._clock() + seconds) + 1, LATEST - 1)
        holder = self._mark(tenant)
        return f"{url}?{EXPIRES}={ends}&{HOLDER}={holder}&{SIGNATURE}={self._sign(urlsplit(url).path, ends, holder)}"

    def tenant(self, path: str, query: bytes, tenants: Collection[str]) -> str | None:
        """Whose address this is; `tenants` are those that there are. None: it is not signed, its signature does not
        hold, or its time is over. Signatures are compared in constant time."""
        given = dict(parse_qsl(query.decode("ascii", "replace"), max_num_fields=8)) if query.count(b"&") < 8 else {}
        ends, holder = given.get(EXPIRES, ""), given.get(HOLDER, "")
        end = int(ends) if ends.isascii() and ends.isdigit() and len(ends) < 14 else 0
        holds = hmac.compare_digest(
            self._sign(path, end, holder).encode(), given.get(SIGNATURE, "").encode("utf-8", "replace")
        )
        return self._whose(holder, tenants) if holds and self._clock() < end < LATEST else None

    def _sign(self, path: str, ends: int, holder: str) -> str:
        return self._digest("address", path, str(ends), holder).hex()

    def _mark(self, tenant: str) -> str:
        return self._digest("holder", tenant)[:MARK].hex()

    def _digest(self, *words: str) -> bytes:
        told = b"".join(len(word).to_bytes(4, "big") + word for word in (text.encode() for text in words))
        return hmac.digest(self._secret, told, hashlib.sha256)

    def _whose(self, holder: str, tenants: Collection[str]) -> str | None:
        if self._known is not tenants:  # marks of all, made once for as long as the keys are the same
            self._known, self._marks = tenants, {self._mark(tenant): tenant for tenant in tenants}
        return self._marks.get(holder)


def is_signed(query: bytes) -> bool:
    """Whether a query claims to have a signature."""
    return f"{SIGNATURE}=".encode() in query
