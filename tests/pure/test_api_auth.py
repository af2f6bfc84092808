"""Keys: hashed, revoked, read again while the server runs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from api.auth import ANONYMOUS, RELOAD_EVERY, Caller, Keys, presented_key, read_keys
from core.errors import Unauthorised
from core.request import Priority


def entry(key: str, *more: str) -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return "\n".join(["[[keys]]", f'sha256 = "{digest}"', *(more or ('tenant = "acme"',))]) + "\n"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_keys_file_everybody_is_anonymous() -> None:
    assert Keys(None).open
    assert Keys(None).caller(None) is ANONYMOUS
    assert Keys(None).caller("anything") is ANONYMOUS


def test_a_key_tells_tenant_tier_and_priority(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("good", 'tenant = "acme"', 'tier = "pro"', 'priority = "urgent"') + entry("other"))
    keys = Keys(file)
    assert keys.caller("good") == Caller("acme", "pro", Priority.URGENT, Priority.URGENT)
    assert keys.caller(b"other") == Caller("acme", "", Priority.NORMAL, Priority.NORMAL)


@pytest.mark.parametrize("key", [None, "", "wrong", "revoked", "good ", "\xff"])
def test_a_missing_a_wrong_and_a_revoked_key_are_refused(tmp_path: Path, key: str | None) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("good") + entry("revoked", 'tenant = "acme"', "revoked = true"))
    with pytest.raises(Unauthorised):
        Keys(file).caller(key)


def test_the_file_is_read_again_after_a_change_and_a_broken_one_keeps_the_old_keys(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.toml", Clock()
    file.write_text(entry("first"))
    keys = Keys(file, clock)

    def rewrite(text: str) -> None:
        file.write_text(text)
        clock.now += RELOAD_EVERY
        os.utime(file, (clock.now, clock.now))

    rewrite(entry("first", 'tenant = "acme"', "revoked = true") + entry("second"))
    assert keys.caller("second").tenant == "acme"
    with pytest.raises(Unauthorised):
        keys.caller("first")
    rewrite("[[keys]\n")
    assert keys.caller("second").tenant == "acme"
    file.unlink()
    clock.now += RELOAD_EVERY
    assert keys.caller("second").tenant == "acme"


def test_a_typo_in_the_file_is_said_once_and_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    file, clock = tmp_path / "keys.toml", Clock()
    file.write_text(entry("good"))
    keys = Keys(file, clock)
    for text in ("[[keys]\n", "keys = [1]", "", " \n", entry("better")):
        file.write_text(text)
        for _ in range(5):
            clock.now += RELOAD_EVERY
            assert keys.caller("better" if text == entry("better") else "good")
    said = [record.levelname for record in caplog.records if record.name == "imagepool.auth"]
    assert said == ["ERROR", "ERROR", "ERROR", "INFO"]


@pytest.mark.parametrize(
    "text",
    [
        "[[keys]\n",
        "keys = 5",
        "keys = [1]",
        '[[key]]\ntenant = "a"\n',
        '[[keys]]\ntenant = "a"\n',
        '[[keys]]\nsha256 = "abc"\ntenant = "a"\n',
        entry("a", 'tenant = ""'),
        entry("a", 'tenant = "a"', 'priority = "asap"'),
        entry("a", 'tenant = "a"', 'revoked = "no"'),
        entry("a", 'tenant = "a"', 'teir = "pro"'),
        entry("a", 'tenant = "a"', "revoked = true") + entry("a", 'tenant = "a"'),
        entry("a", 'tenant = "a"') + entry("a", 'tenant = "b"'),
    ],
)
def test_a_keys_file_that_is_wrong_stops_the_start(text: str) -> None:
    with pytest.raises(ValueError, match=r"keys? "):
        read_keys(text)


def test_a_key_of_a_tier_that_there_is_not_would_have_no_limits_and_is_refused(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.toml", Clock()
    file.write_text(entry("a", 'tenant = "a"', 'tier = "fre"'))
    with pytest.raises(ValueError, match="'fre'"):
        Keys(file, clock, {"free": 1})
    file.write_text(entry("a", 'tenant = "a"', 'tier = "free"'))
    keys = Keys(file, clock, {"free": 1})
    file.write_text(entry("a", 'tenant = "a"', 'tier = "free!"') + entry("b"))
    clock.now += RELOAD_EVERY
    assert keys.caller("a").tier == "free"  # the old keys stay in force


def test_a_key_is_found_in_either_header() -> None:
    assert presented_key({b"x-api-key": b"k"}) == b"k"
    assert presented_key({b"authorization": b"bearer  k"}) == b"k"
    assert presented_key({b"authorization": b"Basic k"}) is None
    assert presented_key({}) is None
