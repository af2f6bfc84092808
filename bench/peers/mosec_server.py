"""mosec as its documentation recommends for bytes in and out: no pickle or JSON (own `deserialize` and `serialize`),
dynamic batching in one stage, a worker process per device."""

from __future__ import annotations

import os

from mosec import Server, Worker

from bench.peers.work import BATCH, WORKERS, work

WAIT_MS = 5


class Model(Worker):
    resp_mime_type = "image/png"

    def __init__(self) -> None:
        super().__init__()
        self.work = work()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        return self.work(data)


if __name__ == "__main__":
    os.environ |= {"MOSEC_PORT": os.environ["BENCH_PORT"], "MOSEC_ADDRESS": "127.0.0.1", "MOSEC_TIMEOUT": "60000"}
    server = Server()
    server.append_worker(Model, num=WORKERS, max_batch_size=BATCH, max_wait_time=WAIT_MS)
    server.run()
