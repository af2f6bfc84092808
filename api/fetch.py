"""What the server asks of other hosts, on behalf of strangers: images by their address, and callbacks.

A stranger must not reach what only this host can reach. So a name is resolved here, every address is looked at, and the
connection goes to just that address (a second look-up could give another one); each redirect is looked at anew; no
proxy of the environment is used. Time, bytes and redirects are bounded. Nor does an error tell a stranger which names
there are in the network of this host: a name without an address and one that leads inside are told alike, and as late.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import ipaddress
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from api.lookups import Address, Lookups
from api.spool import Spool
from core import VERSION
from core.data import Data
from core.errors import BadRequest, InvalidParameter, TooLarge

Reach = Literal["off", "public", "any"]

FETCH_SECONDS = 20.0  # for a whole image, redirects included
CALLBACK_SECONDS = 3.0
REFUSAL_SECONDS = 1.0  # after which a name that leads nowhere is told; a look-up usually takes less
MAX_REDIRECTS = 3
MAX_URL = 2048
UNREACHABLE = httpx.HTTPError, httpx.InvalidURL, UnicodeError  # the last: a name that IDNA cannot have
LOOKUPS = Lookups()
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
RELAYS = ipaddress.IPv4Network("192.88.99.0/24")  # 6to4 anycast, withdrawn by RFC 7526: whichever relay is nearest


class Unreachable(BadRequest):
    """Another host did not give what a request named."""

    code = "invalid_parameter"


class NotAsked(Unreachable):
    """A host that this server does not go to, told as one that cannot be reached."""


@dataclass(frozen=True, slots=True)
class Told:
    """What came of a callback. `taken`: True, False: it never will be, None: it may be tried again, best after so many
    seconds as `after` says. `answered`: whether the host said anything at all in time."""

    taken: bool | None
    after: float = 0.0
    answered: bool = True


def check_url(url: str, parameter: str, reach: Reach) -> str:
    """The address if it may be asked at all, as far as can be told without asking. Raises `InvalidParameter`."""
    if reach == "off":
        raise InvalidParameter(
            f"'{parameter}': this server fetches nothing from other hosts; send the image itself, as a data: URL",
            parameter=parameter,
        )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    of_the_web = parts.scheme.lower() in ("http", "https") and "@" not in parts.netloc
    if not host or not of_the_web or len(url) > MAX_URL or not url.isprintable():  # `urlsplit` passes over line breaks
        raise InvalidParameter(
            f"'{parameter}' must be an http or https address of at most {MAX_URL} characters, without a password",
            parameter=parameter,
        )
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return url
    if reach != "any" and not public(literal):
        raise _private(parameter)
    return url


def public(address: Address) -> bool:
    """Whether it is an address of the open internet: not this host, its network, or a group of hosts. IPv4 addresses
    that hide in IPv6 ones are looked at themselves."""
    if isinstance(address, ipaddress.IPv6Address):
        hidden = address.ipv4_mapped or address.sixtofour
        if hidden is None and address.teredo is not None:
            hidden = address.teredo[1]
        if hidden is None and address in NAT64:
            hidden = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if hidden is not None:
            return public(hidden)
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:  # fec0::/10, the predecessor of fc00::/7
        return False
    if address in RELAYS:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class Pinned(httpx.AsyncHTTPTransport):
    """Connects to an address that was looked at. `parameter` is named in refusals, `tenant` is on whose behalf, `trust`
    says whose certificates are believed."""

    def __init__(self, reach: Reach, parameter: str, tenant: str, trust: ssl.SSLContext) -> None:
        # Connections are not kept: to the pool, hosts at one address would be the same.
        super().__init__(verify=trust, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
        self._reach, self._parameter, self._tenant = reach, parameter, tenant

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        check_url(str(request.url), self._parameter, self._reach)
        fault: httpx.TransportError | None = None
        for address in await self._addresses(request.url):
            try:
                return await super().handle_async_request(_to(request, address))
            except httpx.ConnectError as refused:
                fault = refused
        raise fault or httpx.ConnectError("the name has no address")

    async def _addresses(self, url: httpx.URL) -> list[Address]:
        began = time.monotonic()
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await LOOKUPS.find(url.raw_host.decode(), port, self._tenant)
        inside = self._reach != "any" and not all(map(public, addresses))
        if self._reach != "any" and (inside or not addresses):
            await asyncio.sleep(began + REFUSAL_SECONDS - time.monotonic())
        if inside:
            raise NotAsked(_unreachable(self._parameter), parameter=self._parameter)
        return addresses


def _to(request: httpx.Request, address: Address) -> httpx.Request:
    """The request, sent to that address; its Host header and the name in its TLS handshake stay."""
    extensions = {**request.extensions, "sni_hostname": request.url.raw_host.decode()}
    return httpx.Request(
        request.method, request.url.copy_with(host=str(address)), headers=request.headers, stream=request.stream,
        extensions=extensions,
    )  # fmt: skip


def _private(parameter: str) -> InvalidParameter:
    return InvalidParameter(
        f"'{parameter}' leads to an address that is not on the open internet, and this server does not go there",
        parameter=parameter,
    )


def _unreachable(parameter: str) -> str:
    return f"'{parameter}': its host cannot be reached; name one of the open internet that answers"


@functools.cache
def _trust() -> ssl.SSLContext:
    """Made once, by a thread: reading all certificates takes longer than the event loop may be held up."""
    return httpx.create_ssl_context(trust_env=False)


@asynccontextmanager
async def _client(
    reach: Reach, parameter: str, tenant: str, seconds: float, **more: Any
) -> AsyncIterator[httpx.AsyncClient]:
    trust = await asyncio.to_thread(_trust)
    client = httpx.AsyncClient(
        transport=Pinned(reach, parameter, tenant, trust), timeout=seconds, trust_env=False,
        headers={"user-agent": f"imagepool/{VERSION}", "accept-encoding": "identity"}, **more,
    )  # fmt: skip
    async with client:
        yield client


async def fetch(url: str, parameter: str, *, reach: Reach, max_bytes: int, tenant: str = "") -> Data:
    """What lies at an http(s) address. Raises `InvalidParameter` for an address that is not asked, `Unreachable` when
    the host does not give it, `TooLarge` above `max_bytes`, `StorageFull` and `StorageFailed` as `Spool` does."""
    check_url(url, parameter, reach)
    why = _unreachable(parameter)
    try:
        async with (
            asyncio.timeout(FETCH_SECONDS),
            _client(
                reach, parameter, tenant, FETCH_SECONDS, follow_redirects=True, max_redirects=MAX_REDIRECTS
            ) as client,
            client.stream("GET", url) as answer,
        ):
            if answer.status_code != 200:
                raise Unreachable(f"'{parameter}': its host answers {answer.status_code}", parameter=parameter)
            if answer.headers.get("content-encoding", "identity").lower() != "identity":
                raise Unreachable(f"'{parameter}': its host sends it compressed", parameter=parameter)
            why = f"'{parameter}': its host broke off, or took more than {FETCH_SECONDS:g} s"
            with Spool() as spool:
                async for chunk in answer.aiter_raw():
                    await spool.write(chunk)
                    if spool.size > max_bytes:
                        raise TooLarge(f"'{parameter}' leads to more than {max_bytes} bytes", parameter=parameter)
                return await spool.finish()
    except httpx.TooManyRedirects:
        why = f"'{parameter}': its host redirects more than {MAX_REDIRECTS} times"
    except (TimeoutError, *UNREACHABLE):
        pass
    raise Unreachable(why, parameter=parameter)


async def post(url: str, body: bytes, *, reach: Reach, tenant: str = "") -> Told:
    """Send JSON to a callback address, once. It is never taken after a 4xx or a redirect, or at an address that is not
    asked. What the host answers beside the status and Retry-After is not read."""
    headers = {"content-type": "application/json"}
    try:
        async with (
            asyncio.timeout(CALLBACK_SECONDS),
            _client(reach, "callback_url", tenant, CALLBACK_SECONDS) as client,
            client.stream("POST", url, content=body, headers=headers) as answer,
        ):
            pass
    except (TimeoutError, *UNREACHABLE):
        return Told(None, answered=False)
    except (InvalidParameter, NotAsked):
        return Told(False, answered=False)
    if answer.status_code >= 500 or answer.status_code in (408, 425, 429):
        return Told(None, retry_after(answer.headers.get("retry-after", ""), time.time()))
    return Told(answer.is_success)


def retry_after(text: str, now: float) -> float:
    """The seconds from `now` (since 1970) that a Retry-After header asks for, as a number or as a date; 0 for what is
    neither."""
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = email.utils.parsedate_to_datetime(text[:64])
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
