"""Whole addresses of this server, for answers whose readers need one. Never made from a Host header, which is whatever
the client says: from `public_url` or, without it, from the address and port that its connection came to."""

from __future__ import annotations

import re

from starlette.requests import Request

from core.names import in_url
from core.settings import Settings

_WEB = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)


def base(request: Request, settings: Settings) -> str:
    """What they begin with, without a slash at its end."""
    if settings.public_url:
        return settings.public_url
    host, port = request.scope["server"]
    return f"http://{in_url(host)}{f':{port}' if port else ''}"


def own_path(url: str, request: Request, settings: Settings) -> str:
    """The path of an address of this server, as it was answered or as this client calls it, without a query; another
    address stays as it is."""
    plain = url.partition("?")[0]
    known = base(request, settings)
    if plain.startswith(f"{known}/"):
        return plain.removeprefix(known)
    found = _WEB.match(plain)
    called = request.headers.get("host", "")
    return plain[found.end() :] if found and called and found[1].lower() == called.lower() else plain
