"""Who is calling: API keys from a TOML file that holds only their SHA-256.

    [[keys]]
    sha256 = "<64 hex digits of the key's SHA-256>"
    tenant = "acme"        # whose jobs these are; several keys may share one
    tier = "pro"           # a name of the settings' tiers; left out: no limits but the server's
    priority = "paid"      # this key's default, and the most urgent it may ask for; left out: normal
    revoked = false

A client sends its key as `X-API-Key: <key>` or `Authorization: Bearer <key>`. Without a keys file the server is open:
everybody is the tenant "anonymous". The file is read again within a second of a change; a file that cannot be read
keeps the old keys in force, and so does an empty one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import tomllib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import HTTPConnection

from core.errors import InvalidParameter, Unauthorised
from core.request import Priority

log = logging.getLogger("imagepool.auth")
RELOAD_EVERY = 1.0  # seconds between two looks at the file
NO_DIGEST = bytes(32)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. A `tier` that the settings do not name has no limits of its own. `priority` is what a request gets
    that asks for none, `ceiling` the most urgent that it may ask for."""

    tenant: str = "anonymous"
    tier: str = "anonymous"
    priority: Priority = Priority.NORMAL
    ceiling: Priority = Priority.URGENT

    def grant(self, asked: Priority | None) -> Priority:
        """The priority a request gets. Raises `InvalidParameter` for one more urgent than the key allows."""
        if asked is None:
            return self.priority
        if asked < self.ceiling:
            raise InvalidParameter(
                f"this API key may ask for priority '{self.ceiling.name.lower()}' at most", parameter="priority"
            )
        return asked


ANONYMOUS = Caller()


def caller(request: HTTPConnection) -> Caller:
    """The caller that the door found for this request."""
    found: Caller = request.scope.get("caller", ANONYMOUS)
    return found


def read_priority(value: object) -> Priority | None:
    """0-3 or urgent | paid | normal | test, in any case; None stays None. Raises `InvalidParameter`."""
    if value is None or value == "":
        return None
    word = str(value).strip().upper() if not isinstance(value, bool) else ""
    for priority in Priority:
        if word in (priority.name, str(priority.value), f"P{priority.value}"):
            return priority
    raise InvalidParameter("priority must be 0-3 or one of urgent, paid, normal, test", parameter="priority")


class Keys:
    """The keys in force. `path` None: open to everybody. Raises ValueError when the file is wrong at the start."""

    def __init__(
        self, path: Path | None, clock: Callable[[], float] = time.monotonic, tiers: Container[str] | None = None
    ) -> None:
        """`tiers`: those that there are; a key of another one would have no limits, so the file is wrong then."""
        self._path, self._clock, self._tiers = path, clock, tiers
        self._keys: Mapping[bytes, tuple[bytes, Caller]] = {}
        self._tenants: frozenset[str] = frozenset()
        self._stamp: tuple[int, int] | None = None
        self._next_look = 0.0
        self._fault = ""  # what was said last of a file that could not be read
        if path is not None:
            try:
                self._stamp = self._look()
                self._take(path)
            except OSError as fault:
                raise ValueError(f"the keys file {path} cannot be read: {fault.strerror}") from None
            self._next_look = clock() + RELOAD_EVERY

    @property
    def open(self) -> bool:
        """Nobody needs a key."""
        return self._path is None

    def caller(self, key: str | bytes | None) -> Caller:
        """Whose key this is. Raises `Unauthorised` for none, an unknown one and a revoked one."""
        if self._path is None:
            return ANONYMOUS
        self._reload()
        if not key:
            raise Unauthorised("an API key is needed; send it as 'X-API-Key: <key>' or 'Authorization: Bearer <key>'")
        digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
        # Found by the first bytes of a hash, compared whole in constant time.
        known, found = self._keys.get(digest[:8], (NO_DIGEST, ANONYMOUS))
        if not hmac.compare_digest(digest, known):
            raise Unauthorised("this API key is not known or has been revoked", presented=True)
        return found

    @property
    def tenants(self) -> frozenset[str]:
        """Who has a key in force. The same object for as long as the file is the same."""
        self._reload()
        return self._tenants

    def tier(self, tenant: str) -> str:
        """The tier of a tenant's key that is in force, of several the first one's."""
        return next((found.tier for _, found in self._keys.values() if found.tenant == tenant), "")

    def _take(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError("the keys file is not readable as TOML: it is not UTF-8") from None
        if self._keys and not text.strip():  # somebody is just writing it, or it was cut off
            raise ValueError("the keys file is empty; mark keys as revoked to take them away")
        keys = read_keys(text)
        for _, found in keys.values():
            if found.tier and self._tiers is not None and found.tier not in self._tiers:
                raise ValueError(f"the keys file names the tier '{found.tier[:64]}', which no setting of tiers has")
        self._keys = keys
        self._tenants = frozenset(found.tenant for _, found in self._keys.values())

    def _look(self) -> tuple[int, int]:
        assert self._path is not None
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size

    def _reload(self) -> None:
        now = self._clock()
        if now < self._next_look or self._path is None:
            return
        self._next_look = now + RELOAD_EVERY
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._take(self._path)
                self._stamp = stamp
                log.info("API keys read again: %d in force", len(self._keys))
            self._fault = ""
        except (OSError, ValueError) as fault:
            why = f"the keys file is not there ({fault.strerror})" if isinstance(fault, OSError) else str(fault)
            if why != self._fault:  # said once, not each second
                log.error("%s; the old keys stay in force", why)
            self._fault = why


def presented_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key a request presents, from its (lower-case) headers."""
    key = headers.get(b"x-api-key")
    if key is None:
        scheme, _, rest = headers.get(b"authorization", b"").partition(b" ")
        key = rest.strip() if scheme.lower() == b"bearer" else None
    return key


def read_keys(text: str) -> dict[bytes, tuple[bytes, Caller]]:
    """(digest, caller) by the digest's first 8 bytes, without the revoked keys. Raises ValueError with what is wrong,
    and in which entry."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise ValueError(f"the keys file is not readable as TOML: {fault}") from None
    entries = raw.get("keys", [])
    if set(raw) - {"keys"} or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("the keys file may hold nothing but entries that begin with [[keys]]")
    keys: dict[bytes, tuple[bytes, Caller]] = {}
    numbers: dict[bytes, int] = {}
    for number, entry in enumerate(entries, 1):
        digest, found = _entry(number, entry)
        if (first := numbers.setdefault(digest, number)) != number:  # a forgotten copy would undo a revocation
            raise ValueError(f"key {number} of the keys file is key {first} once more; keep one of the two entries")
        if not entry.get("revoked", False):
            keys[digest[:8]] = digest, found
    return keys


def _entry(number: int, entry: dict[str, Any]) -> tuple[bytes, Caller]:
    known = {"sha256", "tenant", "tier", "priority", "revoked", "name"}
    if unknown := set(entry) - known:
        raise ValueError(f"key {number} of the keys file: unknown entry '{sorted(unknown)[0]}'")
    try:
        digest = bytes.fromhex(entry["sha256"])
        asked = read_priority(entry.get("priority"))
        priority = Priority.NORMAL if asked is None else asked
        if len(digest) != 32 or not entry["tenant"] or not isinstance(entry.get("revoked", False), bool):
            raise ValueError
    except (KeyError, ValueError, TypeError, InvalidParameter):
        needs = "sha256 (64 hex digits), a tenant, and priority and revoked of a legal kind"
        raise ValueError(f"key {number} of the keys file needs {needs}") from None
    return digest, Caller(str(entry["tenant"]), str(entry.get("tier", "")), priority, priority)
