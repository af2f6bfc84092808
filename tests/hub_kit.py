"""The hub's own library, pointed at a hub on loopback for the length of a test."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

NO_WAIT = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)


def point(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Have `huggingface_hub` ask the hub at `url`, keep what it fetches in `cache`, know no token and not wait before
    it tries again. The environment is read when the library is imported, so that is no way for a test."""
    import huggingface_hub.constants
    import huggingface_hub.file_download
    import huggingface_hub.hf_api
    import huggingface_hub.utils._http

    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", NO_WAIT)
