"""A server that does nothing: uvicorn and an application of one line, to see what a machine makes of a load."""

from __future__ import annotations

import os
from typing import Any

import uvicorn


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Every request gets an empty 200."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), log_level="warning", lifespan="off")
