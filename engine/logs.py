"""One log for everything: structlog's lines and those of the standard library (uvicorn's too) go the same road to
stderr, for people or as one JSON object a line.

A line is an event and its facts, never prose with values mixed in: `log.info("job ended", job=..., model=...)`. The
usual facts are job, model, resolution, device. Image bytes and prompts are never written: bytes become their number,
what people typed becomes its length, and addresses that clients named, which may hold what lets one in, are left out.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any, TextIO, cast

import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars

__all__ = ["bound_contextvars", "catch_strays", "get_logger", "set_up"]

Line = MutableMapping[str, Any]
PRIVATE = frozenset({"prompt", "negative_prompt", "params", "body", "authorization", "api_key", "x_api_key"})
MOST_CHARACTERS = 1_000
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029)}


def set_up(level: str = "info", form: str = "console", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (stderr). `form`: console or json. May be called again."""
    stream = stream or sys.stderr
    before: list[Any] = [
        merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        discreet,
    ]
    if form == "json":
        last: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate, logger.disabled = True, False
        logger.setLevel(logging.NOTSET)  # the root's threshold is the one that counts
    logging.getLogger("httpx").setLevel(max(threshold, logging.WARNING))  # below, it writes whole addresses
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def catch_strays() -> None:
    """What no one caught, in any thread, goes to the log like all else, instead of to stderr past it."""
    log = logging.getLogger("imagepool")
    usual = sys.excepthook

    def uncaught(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            usual(kind, fault, trace)
        else:
            log.critical("uncaught exception", exc_info=(kind, fault, trace))

    def in_thread(told: threading.ExceptHookArgs) -> None:
        if told.exc_value is not None:
            name = told.thread.name if told.thread else None
            log.error("uncaught exception in a thread", extra={"where": name}, exc_info=told.exc_value)

    def ignored(told: Any) -> None:
        log.error("exception ignored", extra={"where": repr(told.object)[:200]}, exc_info=told.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = uncaught, in_thread, ignored


def get_logger(name: str = "imagepool", **facts: Any) -> structlog.typing.FilteringBoundLogger:
    """A logger; `facts` are on every line of it."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(name, **facts))


def discreet(_logger: Any, _method: str, line: Line) -> Line:
    """Take out of a line what must not be in a log, and what could forge another line."""
    line.pop("color_message", None)  # uvicorn's event once more, with escape codes
    for key, value in line.items():
        if isinstance(value, str) and key != "exception":
            line[key] = _hidden(value) if key in PRIVATE else _plain(value)
        elif isinstance(value, bytes | bytearray | memoryview):
            line[key] = f"<{len(value)} bytes>"
        elif key in PRIVATE and value is not None:
            line[key] = "<hidden>"
    return line


def _hidden(text: str) -> str:
    return f"<{len(text)} characters>"


def _plain(text: str) -> str:
    text = text.translate(_CONTROLS) if not text.isprintable() else text
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... ({len(text)} characters)"
