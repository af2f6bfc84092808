"""Which requests pass where no key is asked for: by their Host, and by the page that made them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Scope

from api.errors import HostNotAllowed, OriginNotAllowed
from api.hosts import MOST_KNOWN, Browsers
from core.settings import Settings
from tests.pure.api_kit import IMAGE, world
from tests.pure.dialect_kit import KEY, Server, keys_file
from tests.pure.test_api_limits import World

GIVEN: dict[str, Any] = {
    "public_url": "https://images.example.com/pool", "allowed_hosts": ("imagepool", "*.cluster.local"),
    "cors_origins": ("https://app.example",),
}  # fmt: skip
PAGE = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
PROBES = ("/health", "/health/live", "/health/ready", "/ready")


def verdict(method: str = "GET", given: dict[str, Any] = GIVEN, **headers: str) -> str:
    """The code of the refusal; "" when it passes."""
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    try:
        Browsers(Settings(**given)).check(method, named)
    except (HostNotAllowed, OriginNotAllowed) as refusal:
        return refusal.code
    return ""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with world(tmp_path) as server:
        yield server


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:8000", "10.2.3.4:80", "[::1]", "[::1]:8000", "[2001:DB8::7]:1", "localhost", "LocalHost:9",
    "localhost.", "a.b.localhost", "images.example.com", "Images.Example.COM:443", "imagepool", "IMAGEPOOL:8000",
    "imagepool.", "127.0.0.1:", "[::1]:", "localhost:", "a.cluster.local", "imagepool.prod.svc.cluster.local:8000",
])  # fmt: skip
def test_an_address_localhost_and_names_that_were_given_pass(host: str) -> None:
    assert verdict(host=host) == ""


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:8000", "localhost.evil.example", "evillocalhost", "127.0.0.1.evil.example",
    "notimages.example.com", "x.images.example.com", "cluster.local", "evilcluster.local", "0x7f.1", "127.1",
    "2130706433", "[::1", "::1", "[]", "a b", "localhost:evil", "localhost@evil.example", "localhost/..",
    "\u00e9.example", "*", "*.cluster.local:", ".localhost:80:80", "a" * 30_000,
])  # fmt: skip
def test_a_name_that_anybody_could_point_here_is_refused(host: str) -> None:
    assert verdict(host=host) == "host_not_allowed"


def test_a_star_lets_every_name_pass_and_no_name_is_no_browser() -> None:
    assert verdict(given={"allowed_hosts": ("*",)}, host="any.example") == ""
    assert verdict(given={}) == verdict(given={}, host="") == ""
    assert verdict(given={}, host="imagepool") == "host_not_allowed"


def test_what_is_remembered_of_hosts_is_bounded() -> None:
    browsers = Browsers(Settings())
    for number in range(3 * MOST_KNOWN):
        browsers.check("GET", {b"host": f"127.0.0.1:{number}".encode()})
    assert len(browsers._known) <= MOST_KNOWN


@pytest.mark.parametrize("origin", ["https://images.example.com", "https://app.example"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_that_were_invited_pass(method: str, origin: str) -> None:
    assert verdict(method, host="127.0.0.1:8000", origin=origin) == ""
    assert verdict(method, host="127.0.0.1:8000", origin=origin, sec_fetch_site="cross-site") == ""


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_page_of_our_own_has_our_scheme_too(method: str) -> None:
    ours = {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}
    assert verdict(method, **ours) == ""
    tls = ours | {"origin": "https://127.0.0.1:8000"}
    assert verdict(method, **tls) == "origin_not_allowed"
    assert verdict(method, **tls, x_forwarded_proto="https") == ""
    assert verdict(method, **ours, x_forwarded_proto="https") == "origin_not_allowed"
    assert verdict(method, **tls, sec_fetch_site="same-origin") == ""
    for site in ("cross-site", "same-site"):  # the browser knows: it is the other scheme
        assert verdict(method, **ours, sec_fetch_site=site) == "origin_not_allowed"
        assert verdict(method, **ours, sec_fetch_site=site, sec_fetch_mode="websocket") == ""


@pytest.mark.parametrize("origin", [
    "https://evil.example", "null", "", "http://127.0.0.1:3000", "http://127.0.0.1", "http://localhost:8000",
    "https://app.example:8443", "http://app.example", "https://app.example.evil.example", "file://", "127.0.0.1:8000",
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_pages_of_other_origins_are_refused(method: str, origin: str) -> None:
    assert verdict(method, host="127.0.0.1:8000", origin=origin) == "origin_not_allowed"
    assert verdict(method, host="127.0.0.1:8000", origin=origin, sec_fetch_site="same-site") == "origin_not_allowed"


def test_the_browser_s_word_that_it_is_our_page_holds_behind_a_proxy_that_renames_the_host() -> None:
    assert verdict("POST", host="imagepool", origin="https://other.name", sec_fetch_site="same-origin") == ""


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_of_other_sites_only_somebody_who_follows_a_link_passes(site: str) -> None:
    ours = {"host": "127.0.0.1:8000", "sec_fetch_site": site}
    page = {name.replace("-", "_"): value for name, value in PAGE.items()}
    assert verdict(**ours, **page) == verdict("HEAD", **ours, **page) == ""
    for method, more in (
        ("POST", page), ("GET", {}), ("GET", page | {"sec_fetch_dest": "iframe"}),
        ("GET", page | {"sec_fetch_dest": "object"}), ("GET", {"sec_fetch_mode": "no-cors"}),
        ("GET", {"sec_fetch_mode": "cors"}),
        ("GET", {"sec_fetch_mode": "no-cors", "referer": "https://evil.example/https://app.example/"}),
    ):  # fmt: skip
        assert verdict(method, **ours, **more) == "origin_not_allowed", (method, more)
    assert verdict(**ours | {"sec_fetch_site": "none"}) == verdict(**ours | {"sec_fetch_site": "same-origin"}) == ""


def test_an_invited_page_may_show_our_images_though_browsers_send_no_origin_for_them() -> None:
    shown = {"sec_fetch_mode": "no-cors", "sec_fetch_dest": "image", "sec_fetch_site": "cross-site"}
    assert verdict(host="localhost", referer="https://app.example/a?b", **shown) == ""
    assert verdict(host="localhost", **shown) == "origin_not_allowed"


def test_where_every_origin_is_invited_every_page_passes() -> None:
    assert verdict("POST", {"cors_origins": ("*",)}, host="[::1]", origin="null", sec_fetch_site="cross-site") == ""


# --- the whole server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [
    "/jobs", "/run/echo", "/edit", "/api/v1/images/enhance", "/api/v1/image/generate", "/v1/images/edits",
    "/api/v1/inpaint", "/api/v1/lora/upload", "/nowhere",
])  # fmt: skip
@pytest.mark.parametrize(("headers", "status"), [
    ({"host": "evil.example"}, 421), ({"origin": "https://evil.example"}, 403), ({"sec-fetch-site": "cross-site"}, 403),
])  # fmt: skip
async def test_no_route_works_for_a_stranger_s_page(
    server: Server, path: str, headers: dict[str, str], status: int
) -> None:
    before = server.engine.snapshot()["jobs"]
    answer = await server.client.post(path, content=IMAGE, headers={"content-type": "image/png", **headers})
    assert answer.status_code == status and "evil" not in answer.text
    assert "--allowed-hosts" in answer.text if status == 421 else "--cors-origins" in answer.text
    assert server.engine.snapshot()["jobs"] == before


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/metrics", "/models", "/system/status", "/iopaint/"])
async def test_nothing_can_be_read_by_a_name_that_was_pointed_here(server: Server, path: str) -> None:
    assert (await server.client.get(path, headers={"host": "evil.example:8000"})).status_code == 421
    assert (await server.client.get(path, headers={"host": "10.1.2.3:8000"})).status_code != 421


@pytest.mark.parametrize("path", PROBES)
async def test_whoever_looks_after_its_health_may_call_it_as_they_like(server: Server, path: str) -> None:
    assert (await server.client.get(path, headers={"host": "imagepool.prod.svc"})).status_code == 200


async def test_with_keys_no_name_and_no_origin_counts_for_the_key_does(tmp_path: Path) -> None:
    odd = {"host": "evil.example", "origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    async with world(tmp_path, keys_file=keys_file(tmp_path)) as server:
        assert (await server.client.get("/models", headers=odd | {"x-api-key": KEY})).status_code == 200
        assert (await server.client.get("/models", headers=odd)).status_code == 401
        assert (await server.client.get("/metrics", headers=odd)).status_code == 200


async def test_somebody_who_follows_a_link_to_the_description_sees_it(server: Server) -> None:
    answer = await server.client.get("/docs", headers={"sec-fetch-site": "cross-site", **PAGE})
    assert answer.status_code == 200


@pytest.mark.parametrize(("headers", "keyed", "passes"), [
    ({}, False, True),
    ({"host": "evil.example"}, False, False),
    ({"origin": "https://evil.example"}, False, False),
    ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, False, True),
    ({"host": "evil.example", "origin": "http://evil.example"}, False, False),
    ({"host": "imagepool", "x-api-key": KEY}, True, True),
    ({"host": "imagepool", "origin": "https://evil.example", "x-api-key": KEY}, True, False),
])  # fmt: skip
async def test_the_same_rules_hold_for_web_sockets(
    tmp_path: Path, headers: dict[str, str], keyed: bool, passes: bool
) -> None:
    made = World(tmp_path, **({"keys_file": keys_file(tmp_path)} if keyed else {}))
    reached: list[Scope] = []

    async def app(scope: Scope, *_: Any) -> None:
        reached.append(scope)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        assert message["type"].startswith("websocket.http.response") and message.get("status", 403) == 403

    made.door.app = app
    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    await made.door({"type": "websocket", "path": "/socket.io/", "headers": lines}, receive, send)
    assert bool(reached) == passes
