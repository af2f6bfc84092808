"""The endpoint that everybody writes first: FastAPI, the model in the handler, one request at a time."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI, Request, Response

from bench.peers.work import port, work

app = FastAPI()


@app.post("/run")
async def run(request: Request) -> Response:
    return Response(app.state.work([await request.body()])[0], media_type="image/png")


@app.get("/ready")
async def ready() -> str:
    return "ready"


if __name__ == "__main__":
    app.state.work = work()
    uvicorn.run(app, host="127.0.0.1", port=port(), log_level="warning", access_log=False)
