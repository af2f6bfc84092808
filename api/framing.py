"""What the head of a request says of its body, and what no head may say (RFC 9110, RFC 9112).

A server and a proxy before it must not read one head in two ways: whoever gets a second request past the proxy in the
body of the first acts with the proxy's rights. So what is doubled, contradicts itself or is of another version is
refused, though the parser would make something of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from api.errors import HeaderTooLarge, NotImplementedHere
from core.errors import BadRequest

HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")  # no fragment, no space, nothing beyond ASCII
ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#@]*)(/[\x21\x22\x24-\x7e]*)?")
VERSIONS = ("1.1", "1.0")
ONCE = (b"host", b"content-length", b"transfer-encoding")
SOCKETS = b"/socket.io/"  # where web sockets are served; elsewhere an upgrade is not heard (RFC 9110, 7.8)

MAX_TARGET = 8 << 10  # bytes of path and query: reading what is percent-encoded is slow

Headers = Sequence[tuple[bytes, bytes]]


class Framing(NamedTuple):
    """`length`: bytes of the body, when it is not `chunked`. `target`: the path and query that are asked for.
    `socket`: a web socket is asked for where one is served."""

    length: int
    chunked: bool
    target: bytes
    socket: bool


def read_framing(method: str, target: bytes, version: str, headers: Headers) -> Framing:
    """`headers`: with names in lower case. Raises `BadRequest` for a head that is not to be understood in one way,
    `HeaderTooLarge`, and `NotImplementedHere` for what is not done here."""
    if version not in VERSIONS:
        raise BadRequest("the request is of an HTTP version that is not served; use HTTP/1.1")
    if len(target) > MAX_TARGET:
        raise HeaderTooLarge(f"the request's path and query have more than {MAX_TARGET} bytes; send them in the body")
    found = dict(headers)
    if len(found) < len(headers):
        _check_doubles(headers)
    host = found.get(b"host")
    if not host:
        if version == "1.1":  # an http address without a host is none (RFC 9110, 4.2.1)
            raise BadRequest("the request has no Host header, or an empty one")
    elif HOST.fullmatch(host) is None:
        raise BadRequest("the request's Host header is not a host and a port")
    if TARGET.fullmatch(target) is None:
        target = _odd_target(method, target, host)
    chunked = b"transfer-encoding" in found
    if chunked:
        _check_coding(found, version)
    length = _length(found[b"content-length"]) if b"content-length" in found else 0
    asks = b"upgrade" in found and method == "GET" and version == "1.1" and not chunked and not length
    return Framing(length, chunked, target, asks and target.startswith(SOCKETS) and _asks_for_socket(headers))


def _check_doubles(headers: Headers) -> None:
    names = [name for name, _ in headers]
    for name in ONCE:
        if names.count(name) > 1:
            raise BadRequest(f"the request has more than one {name.decode().title()} header")


def request_line(begun: bytes, piece: bytes) -> tuple[bytes, bool]:
    """What has come of a line that goes on in later pieces, and whether it is whole. Raises `BadRequest` for that of
    another protocol, which the parser would take."""
    line, end, _ = (begun + piece).lstrip(b"\r\n").partition(b"\n")
    if b" RTSP/" in line or b" ICE/" in line:
        raise BadRequest("this is no HTTP request")
    return b"" if end else line, bool(end)


def _odd_target(method: str, target: bytes, host: bytes | None) -> bytes:
    """The path of a target that does not begin with one: a whole address, as proxies are asked, for this very host."""
    absolute = ABSOLUTE.fullmatch(target)
    if method == "CONNECT":
        raise NotImplementedHere("this server is no proxy: CONNECT is not served")
    if absolute is None:
        raise BadRequest("the request's target is not a path; percent-encode what may not stand in one")
    if host is None or absolute[1].lower() != host.lower():
        raise BadRequest("the address in the request line is of another host than the Host header")
    return absolute[2] or b"/"


def _check_coding(found: dict[bytes, bytes], version: str) -> None:
    if version == "1.0" or b"content-length" in found:
        raise BadRequest("the request has a Transfer-Encoding beside HTTP/1.0 or a Content-Length")
    *others, last = (coding.strip(b" \t").lower() for coding in found[b"transfer-encoding"].split(b","))
    if last != b"chunked" or b"chunked" in others:
        raise BadRequest("the last Transfer-Encoding is not 'chunked', or not the only one of that name")
    if others:
        raise NotImplementedHere("the only Transfer-Encoding that is read is 'chunked'; send the body as it is")


def _length(text: bytes) -> int:
    text = text.strip(b" \t")
    if not text.isdigit() or len(text) > 18:
        raise BadRequest("the Content-Length header is not a number")
    return int(text)


def _asks_for_socket(headers: Headers) -> bool:
    options = [word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")]
    wanted = [value.strip().lower() for name, value in headers if name == b"upgrade"]
    return b"upgrade" in options and wanted == [b"websocket"]
