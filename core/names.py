"""Names of hosts: as settings write them, as the Host header of a request does, and addresses made of them."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from core.units import Form, read_words

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?", re.IGNORECASE)
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]{2,45})\]|(?P<name>[a-z0-9_.-]{1,254}))(?::[0-9]{0,5})?", re.IGNORECASE)


def host_of(header: str) -> str:
    """The host that a Host header names, in lower case, without its port, brackets and last dot; "" when it is none."""
    found = _HOST.fullmatch(header)
    return (found["v6"] or found["name"].removesuffix(".")).lower() if found else ""


def is_address(host: str) -> bool:
    """Whether it is an IP address, which no foreign name server can point elsewhere."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether an IP address is reached from this host alone."""
    return is_address(address) and ipaddress.ip_address(address).is_loopback


def in_url(address: str) -> str:
    """An IP address or name as addresses of the web write it: IPv6 in brackets, IPv4 in IPv6's clothes without them."""
    if ":" not in address:
        return address
    mapped = ipaddress.IPv6Address(address).ipv4_mapped if is_address(address) else None
    return str(mapped or f"[{address}]")


def read_host_names(value: Any) -> Any:
    """A tuple of names in lower case: `imagepool`, `*.example.com`, or `*` for any."""
    words = read_words(value)
    if not isinstance(words, list | tuple):
        return words
    if not all(word == "*" or _NAME.fullmatch(str(word).removeprefix("*.")) for word in words):
        raise ValueError("should be host names without scheme and port: imagepool, *.example.com, or * for any")
    return tuple(word.lower() for word in words)


def read_public_url(value: Any) -> Any:
    """http(s)://host[:port][/prefix], without a slash at its end; "" stays."""
    text = value.strip() if isinstance(value, str) else value
    if not text or not isinstance(text, str):
        return text
    wanted = "should be an address such as https://images.example.com or http://10.0.0.5:8000/images"
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise ValueError(wanted) from None
    odd = parts.query or parts.fragment or re.search("@|:$", parts.netloc) or not re.fullmatch(r"[!-~]+", text)
    if not known or odd or not host_of(parts.netloc):
        raise ValueError(wanted)
    host = parts.netloc.lower().removesuffix({"http": ":80", "https": ":443"}[parts.scheme])  # browsers leave it out
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}"


HostNames = Annotated[tuple[str, ...], BeforeValidator(read_host_names), Form("A,B", ",".join)]
PublicUrl = Annotated[str, BeforeValidator(read_public_url), Form("URL", str)]
