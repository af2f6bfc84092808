"""The lock file is what the requirements say: run `make lock` after they have changed."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
AGAIN = "requirements.lock is not of these requirements: run `make lock`"
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^ ;]+)(?: ; [^\\]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")
LEFT_OPEN_BY_OTHERS = {"httptools", "uvloop", "websockets"}  # which uvicorn would take in any version


def wanted() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked() -> dict[str, tuple[str, int]]:
    """By name the version and how many hashes."""
    text = (ROOT / "requirements.lock").read_text("utf-8")
    rest = PIN.sub("", "".join(line for line in text.splitlines(True) if not line.startswith("#")))
    assert not rest, f"nothing but pins and hashes is to be in requirements.lock, no index either: {rest[:200]}"
    return {canonicalize_name(name): (version, hashes.count("sha256:")) for name, version, hashes in PIN.findall(text)}


def test_every_requirement_is_pinned() -> None:
    assert all(re.fullmatch(r"==[^*]+", str(one.specifier)) for one in wanted())
    assert {one.name for one in wanted()} >= LEFT_OPEN_BY_OTHERS


def test_the_lock_file_has_every_pin_with_its_hashes() -> None:
    found = locked()
    for one in wanted():
        if one.name != "torch":
            version, hashes = found.get(canonicalize_name(one.name), ("", 0))
            assert f"=={version}" == str(one.specifier) and hashes, f"{one}: {AGAIN}"


def test_the_lock_file_has_what_these_bring_along() -> None:
    found = locked()
    todo, seen = [one for one in wanted() if one.name != "torch"], set()
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if (key := (name, frozenset(one.extras))) in seen:
            continue
        seen.add(key)
        assert name in found and one.specifier.contains(found[name][0]), f"{one}: {AGAIN}"
        for extra in one.extras or {""}:
            environment = {**default_environment(), "extra": extra}
            brought = [Requirement(text) for text in requires(one.name) or ()]
            todo += [more for more in brought if more.marker is None or more.marker.evaluate(environment)]
    assert {"click", "h11", "starlette", "pydantic-core"} <= {name for name, _ in seen}


def test_the_lock_file_leaves_torch_and_its_cuda_out_and_names_no_host() -> None:
    names = set(locked()) - {"nvidia-ml-py"}
    assert not {name for name in names if name.startswith(("torch", "nvidia", "cuda", "triton"))}
    text = (ROOT / "requirements.lock").read_text("utf-8")
    assert "://" not in text and " @ " not in text and "--index" not in text and "--find-links" not in text
