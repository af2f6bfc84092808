"""Whose request it is, behind proxies that are trusted and before those that are not."""

from __future__ import annotations

import pytest

from api.addresses import Proxies

PROXIES = Proxies(["10.0.0.0/8", "fd00::/8"])


@pytest.mark.parametrize(
    ("told", "client"),
    [
        ({"x-forwarded-for": "1.2.3.4"}, "1.2.3.4"),
        ({"x-forwarded-for": "6.6.6.6, 1.2.3.4"}, "1.2.3.4"),
        ({"x-forwarded-for": "6.6.6.6, 1.2.3.4, 10.2.2.2"}, "1.2.3.4"),
        ({"x-forwarded-for": "1.2.3.4:567"}, "1.2.3.4"),
        ({"x-forwarded-for": "[2001:db8::1]:567"}, "2001:db8::1"),
        ({"x-forwarded-for": "::ffff:1.2.3.4"}, "1.2.3.4"),
        ({"x-forwarded-for": "10.3.3.3, 10.2.2.2"}, "10.3.3.3"),
        ({"x-forwarded-for": "1.2.3.4, unknown, 10.2.2.2"}, "10.2.2.2"),
        ({"x-forwarded-for": "a\x00b"}, "10.1.1.1"),
        ({"x-forwarded-for": ""}, "10.1.1.1"),
        ({"forwarded": 'for=6.6.6.6, for="[2001:db8::1]:9";proto=https;by=10.1.1.1'}, "2001:db8::1"),
        ({"forwarded": "For=1.2.3.4;host=here, for=10.2.2.2"}, "1.2.3.4"),
        ({"forwarded": "proto=https"}, "10.1.1.1"),
        ({"forwarded": "for=_hidden"}, "10.1.1.1"),
        ({"forwarded": "for=1.2.3.4", "x-forwarded-for": "1.2.3.4"}, "1.2.3.4"),
        ({"forwarded": "for=6.6.6.6", "x-forwarded-for": "1.2.3.4"}, "10.1.1.1"),
        ({}, "10.1.1.1"),
    ],
)
def test_the_right_most_address_that_is_no_proxy_of_ours_asks(told: dict[str, str], client: str) -> None:
    assert PROXIES.client("10.1.1.1", [(name.encode(), text.encode()) for name, text in told.items()]) == client


def test_several_headers_are_one_list() -> None:
    headers = [(b"x-forwarded-for", b"6.6.6.6"), (b"x-forwarded-for", b"1.2.3.4")]
    assert PROXIES.client("10.1.1.1", headers) == "1.2.3.4"


def test_only_the_networks_named_are_trusted() -> None:
    assert PROXIES.trusts("10.255.0.1") and PROXIES.trusts("fd12::1") and PROXIES.trusts("::ffff:10.0.0.1")
    assert not PROXIES.trusts("11.0.0.1") and not PROXIES.trusts("") and not Proxies([]).trusts("127.0.0.1")
