"""The log: one form for our lines and the libraries', and nothing in it that must not be there."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from api import fetch
from engine import logs
from workers.printed import PAUSE, Printed


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.set_up("info", "json", stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_an_event_with_its_facts_and_its_context(written: io.StringIO) -> None:
    log = logs.get_logger(device="cuda:0")
    with logs.bound_contextvars(job="7"):
        log.info("job ended", model="lama", seconds=0.5)
    log.debug("not at this level")
    (line,) = lines(written)
    assert line.pop("timestamp").endswith("Z")
    facts = {"device": "cuda:0", "job": "7", "model": "lama", "seconds": 0.5}
    assert line == {"event": "job ended", "level": "info"} | facts


def test_the_libraries_lines_come_the_same_way_once(written: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").warning("started %s", "here")
    logging.getLogger("uvicorn.access").info("GET /")
    assert [line["event"] for line in lines(written)] == ["started here", "GET /"]


async def test_addresses_that_the_server_asks_are_not_written(written: io.StringIO) -> None:
    """They are clients', and may hold what lets whoever reads it in."""
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    host = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with host:
        url = f"http://127.0.0.1:{host.sockets[0].getsockname()[1]}/told?token=hidden"
        assert (await fetch.post(url, b"{}", reach="any")).taken
    assert "hidden" not in written.getvalue()


def test_image_bytes_and_prompts_are_not_written(written: io.StringIO) -> None:
    logs.get_logger().info("got", prompt="a secret wish", data=b"\x89PNG1234", params={"prompt": "secret"})
    logging.getLogger("x").info("got", extra={"negative_prompt": "another secret"})
    text = written.getvalue()
    assert "secret" not in text and "PNG" not in text
    assert lines(written)[0]["prompt"] == "<13 characters>" and lines(written)[0]["data"] == "<8 bytes>"
    assert lines(written)[0]["params"] == "<hidden>"


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_name_with_line_breaks_cannot_forge_a_line(form: str, written: io.StringIO) -> None:
    logs.set_up("info", form, written)
    logs.get_logger().info("upload\nforged", name="a\r\n2026 [error] forged\x1b[31m\u2028")
    text = written.getvalue()
    assert text.count("\n") == 1 and "\x1b" not in text and "\u2028" not in text


def test_endless_text_is_cut(written: io.StringIO) -> None:
    logs.get_logger().info("x" * 100_000)
    assert len(written.getvalue()) < 2_000 and "100000 characters" in written.getvalue()


@pytest.mark.parametrize("form", ["console", "json"])
def test_an_exception_keeps_its_trace(form: str, written: io.StringIO) -> None:
    logs.set_up("info", form, written)
    try:
        raise ValueError("boom")
    except ValueError:
        logs.get_logger().exception("it broke")
    assert "it broke" in written.getvalue() and "ValueError: boom" in written.getvalue()


async def test_what_nobody_caught_is_a_line_too(written: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((sys, "excepthook"), (threading, "excepthook"), (sys, "unraisablehook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    logs.catch_strays()

    def fail() -> None:
        raise ValueError("two\nlines")

    class Leaves:
        def __del__(self) -> None:
            fail()

    thread = threading.Thread(target=fail, name="reader")
    thread.start()
    thread.join()
    del thread
    Leaves()
    try:
        fail()
    except ValueError as fault:
        sys.excepthook(type(fault), fault, fault.__traceback__)
    told = lines(written)
    assert [line["event"] for line in told] == [
        "uncaught exception in a thread", "exception ignored", "uncaught exception",
    ]
    assert all("ValueError: two\nlines" in line["exception"] for line in told) and told[0]["where"] == "reader"


async def test_what_a_worker_prints_is_whole_tracebacks_and_single_lines(written: io.StringIO) -> None:
    ours, its = os.pipe()
    printed = Printed(ours, "cpu:3", 2)
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: boom'
    os.write(its, b"loading\nhalf of a")
    os.write(its, b" line\n\xff\n")
    await asyncio.sleep(3 * PAUSE)
    os.write(its, f"job 7:\n{trace}\n".encode())
    os.close(its)
    printed.close()
    printed.close()
    told = lines(written)
    assert [line.get("text") for line in told] == ["loading", "half of a line", "\ufffd", None]
    assert told[3]["exception"] == f"job 7:\n{trace}" and told[3]["level"] == "error"
    assert all((line["event"], line["device"], line["incarnation"]) == ("worker wrote", "cpu:3", 2) for line in told)
