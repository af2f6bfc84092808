"""Which requests a browser may bring where no key is asked for: every page that its user opens can send some.

Two rules. The Host header names an address, `localhost` or a name that the operator gave: else a stranger's page whose
name was pointed to this machine (DNS rebinding) would be one of ours. And a request that a page makes comes from our
own origin or one of `cors_origins`. A client that is no browser sends no Origin and no Sec-Fetch-*, and passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from api.errors import HostNotAllowed, OriginNotAllowed
from core.names import host_of, is_address
from core.settings import Settings

MOST_KNOWN = 1024  # Host headers that passed and need not be looked at again
ANY = "*"


class Browsers:
    """What is let in. Headers are those of one request, by their lower-case names."""

    def __init__(self, settings: Settings) -> None:
        public = urlsplit(settings.public_url)
        self._public_origin = f"{public.scheme}://{public.netloc}"
        self._names = {"localhost", public.hostname or "localhost", *settings.allowed_hosts}
        self._suffixes = (".localhost", *(name[1:] for name in settings.allowed_hosts if name.startswith("*.")))
        self._origins = frozenset(settings.cors_origins)
        self._known: set[bytes] = set()

    def check(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raises `HostNotAllowed` and `OriginNotAllowed`."""
        self.check_host(headers)
        self.check_origin(method, headers)

    def check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises `HostNotAllowed`. Without the header it is no browser."""
        host = headers.get(b"host")
        if not host or host in self._known:
            return
        if not self._answers_to(host_of(host.decode("latin-1"))):
            raise HostNotAllowed(
                "the Host header names a host that this server does not answer to; call it by its IP address or as "
                "localhost, or have its operator name that host in --allowed-hosts or --public-url"
            )
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known.add(host)

    def check_origin(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raises `OriginNotAllowed`."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin is None and site is None:
            return
        if ANY in self._origins or site == b"same-origin":
            return
        if origin is not None:
            welcome = self._is_ours(origin.decode("latin-1"), headers)
        else:
            welcome = site == b"none" or _follows_link(method, headers) or self._is_ours(_referring(headers), headers)
        if not welcome:
            raise OriginNotAllowed(
                "a page of another origin may not use this server; its operator may let it: --cors-origins with the "
                "origin of that page, such as https://app.example.com"
            )

    def _answers_to(self, host: str) -> bool:
        if ANY in self._names or host in self._names:
            return True
        return host.endswith(self._suffixes) or is_address(host)

    def _is_ours(self, origin: str, headers: Mapping[bytes, bytes]) -> bool:
        """Whether it is an origin of `cors_origins`, that of the public address, or that of the address asked for. A
        browser that says it is not is believed. Where it says nothing, our scheme is http, or what a proxy that speaks
        TLS for us says: no page adds that header unasked."""
        if origin in self._origins or origin == self._public_origin:
            return True
        host = headers.get(b"host", b"").decode("latin-1").lower()
        told = headers.get(b"sec-fetch-site") is not None and headers.get(b"sec-fetch-mode") != b"websocket"
        if not host or told:  # of web sockets browsers have said that ws is another site than http
            return False
        scheme = headers.get(b"x-forwarded-proto", b"http").decode("latin-1").lower()
        return origin.lower() == f"{scheme}://{host}"


def _follows_link(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether somebody goes to one of our addresses in a tab: the page that they leave sees nothing of the answer."""
    return (
        method in ("GET", "HEAD")
        and headers.get(b"sec-fetch-mode") == b"navigate"
        and headers.get(b"sec-fetch-dest", b"document") == b"document"
    )


def _referring(headers: Mapping[bytes, bytes]) -> str:
    """The origin of the page that embeds one of our addresses, for which browsers send no Origin; "" when untold."""
    scheme, _, rest = headers.get(b"referer", b"").decode("latin-1").partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if rest else ""
