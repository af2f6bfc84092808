"""Where the weights of a model lie, found without torch: in a file that was named, or in torch's usual cache folder."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Weights:
    """One file of weights. `url`: where it can be fetched; its last part is the file's name in the cache folder. `md5`:
    what was published for it. `url_variable` and `md5_variable`: environment variables that replace the two; the first
    may also hold the path of a file. `path`: the file, wherever it lies; then nothing else counts."""

    url: str = ""
    md5: str = ""
    url_variable: str = ""
    md5_variable: str = ""
    path: str = ""

    @classmethod
    def read(cls, raw: Any) -> Weights:
        """From the table of a model's file. Raises ValueError."""
        known = {field.name for field in fields(cls)}
        if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
            raise ValueError("'weights' must be a table of texts")
        for key in raw:
            if key not in known:
                raise ValueError(f"weights: unknown key '{key}'; there are {', '.join(sorted(known))}")
        if not raw.get("url") and not raw.get("path"):
            raise ValueError("weights: a url or a path is needed")
        return cls(**raw)

    def source(self, environ: Mapping[str, str] = os.environ) -> str:
        """Where to fetch it: what the environment names, else `url`."""
        return environ.get(self.url_variable) or self.url

    def checksum(self, environ: Mapping[str, str] = os.environ) -> str:
        """The md5 that a fetched file must have, in lower case; empty: any. A source of one's own has none but one's
        own."""
        own = self.source(environ) != self.url
        return (environ.get(self.md5_variable) or ("" if own else self.md5)).lower()

    def file(self, environ: Mapping[str, str] = os.environ) -> Path:
        """Where it should lie; it may be missing."""
        source = self.path or self.source(environ)
        if self.path or Path(source).is_file():
            return Path(source)
        return cache_folder(environ) / Path(urlsplit(source).path).name


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """torch.hub's folder for checkpoints."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("TORCH_HOME") or f"{cache}/torch").expanduser() / "hub" / "checkpoints"


def intact(file: Path) -> bool:
    """Whether it looks whole. TorchScript files (.pt) are zip archives, whose list of contents stands at the end: one
    that was cut off lacks it."""
    return file.suffix != ".pt" or zipfile.is_zipfile(file)


def why_unusable(file: Path) -> str | None:
    """What keeps a file of weights from being offered, as half a sentence; None: nothing that can be seen."""
    if not file.is_file():
        return f"its weights {file.name} are not there"
    if not os.access(file, os.R_OK):
        return f"its weights {file.name} cannot be read"
    if not intact(file):
        return f"its weights {file.name} are no TorchScript file, or a damaged one"
    return None
