"""Whose request it is: the address behind the proxies that are trusted.

A header that names an address is believed from a trusted proxy alone, and read from the right, for every proxy appends
the address it was asked from: what stands left of the first stranger is that stranger's own word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")
MAX_HOPS = 32  # entries of such a header that are read

Headers = Sequence[tuple[bytes, bytes]]


def _read(text: str) -> IPv4Address | IPv6Address | None:
    if (found := WITH_PORT.fullmatch(text)) is not None:
        text = found[1] or found[2]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class Proxies:
    """The networks whose word about an address is believed. Raises ValueError for one that is none."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks: list[IPv4Network | IPv6Network] = [ip_network(text, strict=False) for text in networks]

    def trusts(self, address: str) -> bool:
        """Whether this peer is one of them."""
        if not self._networks:
            return False
        found = _read(address)
        return found is not None and any(found in network for network in self._networks)

    def client(self, peer: str, headers: Headers) -> str:
        """Who asked a trusted peer: the right-most address that is no proxy of ours. The peer itself when nothing is
        told, or when X-Forwarded-For and Forwarded disagree: then one of them is the client's own."""
        told = [
            self._outermost(peer, hops)
            for hops in (_x_forwarded_for(headers), _forwarded(headers)) if hops
        ]  # fmt: skip
        return told[0] if told and told.count(told[0]) == len(told) else peer

    def _outermost(self, peer: str, hops: list[str]) -> str:
        address = peer
        for hop in hops[: -MAX_HOPS - 1 : -1]:
            found = _read(hop)
            if found is None:
                break
            address = str(found)
            if not self.trusts(address):
                break
        return address


def _x_forwarded_for(headers: Headers) -> list[str]:
    return [hop.strip() for hop in _joined(headers, b"x-forwarded-for").split(",") if hop.strip()]


def _forwarded(headers: Headers) -> list[str]:
    """The `for` of each element of RFC 7239's header; "" where it has none."""
    hops = []
    for element in _joined(headers, b"forwarded").split(","):
        pairs = dict(pair.strip().partition("=")[::2] for pair in element.lower().split(";"))
        if element.strip():
            hops.append(pairs.get("for", "").strip('"'))
    return hops


def _joined(headers: Headers, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in headers if key == name)
