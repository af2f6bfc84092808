"""Signed addresses: for one path, one tenant and a while; and the secret that they are made with."""

from __future__ import annotations

import stat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import StorageFailed
from core.signing import Signer, is_signed
from store import secret

PATH = "/v1/images/1/content"
TENANTS = frozenset({"acme", "zenith"})


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def ask(signer: Signer, url: str, tenants: frozenset[str] = TENANTS, path: str | None = None) -> str | None:
    parts = urlsplit(url)
    return signer.tenant(path or parts.path, parts.query.encode(), tenants)


def test_an_address_serves_for_its_time() -> None:
    clock = Clock()
    signer = Signer(b"s" * 32, clock)
    for base in ("http://pool:8000", ""):
        clock.now = 1_800_000_000.0
        url = signer.signed(base + PATH, "acme", 3600)
        assert url.startswith(base + PATH + "?") and "acme" not in url and is_signed(urlsplit(url).query.encode())
        assert ask(signer, url) == "acme"
        clock.now += 3600
        assert ask(signer, url) == "acme"
        clock.now += 2
        assert ask(signer, url) is None


def test_the_longest_time_is_as_good_as_for_ever() -> None:
    signer = Signer(b"s" * 32, Clock())
    assert ask(signer, signer.signed(PATH, "acme", 1e15)) == "acme"


def test_what_is_changed_does_not_hold() -> None:
    signer = Signer(b"s" * 32, Clock())
    url, other = (signer.signed(PATH, tenant, 3600) for tenant in ("acme", "zenith"))
    assert ask(signer, other) == "zenith"
    assert ask(signer, url, path=PATH.replace("1", "2")) is None, "another image"
    fields = dict(pair.split("=") for pair in url.partition("?")[2].split("&"))
    later = url.replace(fields["expires"], str(int(fields["expires"]) + 1))
    theirs = url.replace(fields["holder"], dict(p.split("=") for p in other.partition("?")[2].split("&"))["holder"])
    for changed in (later, theirs, url[:-1], url[:-1] + ("0" if url[-1] != "0" else "1"), PATH, url + "&" * 50):
        assert ask(signer, changed) is None
    assert ask(Signer(b"t" * 32, Clock()), url) is None, "another server's"
    assert ask(signer, url, frozenset({"zenith"})) is None, "the tenant has no key any more"
    assert ask(signer, url, TENANTS) == "acme"


@given(st.binary(max_size=200))
def test_any_query_is_survived(query: bytes) -> None:
    assert Signer(b"s" * 32, Clock()).tenant(PATH, query, TENANTS) is None


@pytest.mark.parametrize("expires", ["", "-1", "9" * 13, "9" * 400, "1e9", "١٢٣", "1800000001.5"])
def test_an_end_that_is_none_does_not_hold(expires: str) -> None:
    query = f"expires={expires}&holder=x&signature=y".encode()
    assert Signer(b"s" * 32, Clock()).tenant(PATH, query, TENANTS) is None


def test_words_cannot_be_shifted_from_one_to_the_next() -> None:
    signer = Signer(b"s" * 32, Clock())
    assert signer._digest("ab", "c") != signer._digest("a", "bc")


def test_the_secret_is_made_once_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    made = secret.kept(tmp_path)
    assert len(made) == 32 and secret.kept(tmp_path) == made
    assert stat.S_IMODE((tmp_path / secret.NAME).stat().st_mode) == 0o600
    (tmp_path / f"{secret.NAME}.part").write_text("of a server that died")
    (tmp_path / secret.NAME).unlink()
    assert secret.kept(tmp_path) != made


def test_a_secret_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("ab" * 32 + "\n")
    assert secret.read(file) == b"\xab" * 32
    file.write_text("a sentence of more than thirty-two bytes")
    assert secret.read(file) == b"a sentence of more than thirty-two bytes"
    file.write_text("ab" * 31)
    for bad in (file, tmp_path / "none"):
        with pytest.raises(StorageFailed) as refused:
            secret.read(bad)
        assert str(tmp_path) not in str(refused.value) and bad.name in str(refused.value)
    with pytest.raises(ValueError, match="32 are needed"):
        Signer(b"short")
