"""What a library says of its failure, made fit to be passed on: one line, of bounded length, without this machine's
folders and addresses of memory."""

from __future__ import annotations

import re

MOST = 240  # characters
PLACE = re.compile(r"['\"`]?(?<![\w:/.~-])(?:[A-Za-z]:(?=\\)|~|\.{1,2})?[\\/][\w.@+~-]+(?:[\\/]+[\w.@+~-]*)+['\"`]?")
ADDRESS = re.compile(r"\s*\bat 0x[0-9a-fA-F]{6,}")


def hearsay(fault: BaseException, most: int = MOST) -> str:
    """The first line of an exception's message, or its class's name where it says nothing. A folder or file becomes its
    last part in quotes."""
    lines = str(fault).strip().splitlines()
    line = ADDRESS.sub("", _without_places(" ".join(lines[0].split()))) if lines else ""
    if not line:
        return type(fault).__name__
    return line if len(line) <= most else f"{line[:most].rsplit(' ', 1)[0]} ..."


def _without_places(line: str) -> str:
    def name(match: re.Match[str]) -> str:
        last = [part for part in re.split(r"[\\/]", match[0].strip("'\"`").rstrip(".")) if part][-1]
        return f"'{last}'"

    return PLACE.sub(name, line)
