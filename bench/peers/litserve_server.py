"""LitServe as its documentation recommends above a hundred requests a second: batches, a process per worker, the fast
(ZeroMQ) queue. The body is taken as it is, without a form or JSON around it."""

from typing import Annotated

import litserve as ls
from fastapi import Depends, Request, Response

from bench.peers.work import BATCH, WORKERS, port, work


async def body(request: Request) -> bytes:
    return await request.body()


class Model(ls.LitAPI):
    def setup(self, device: str) -> None:
        self.work = work()

    def decode_request(self, request: Annotated[bytes, Depends(body)]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, inputs: list[bytes]) -> list[bytes]:
        return self.work(inputs)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    model = Model(max_batch_size=BATCH, batch_timeout=0.005)
    server = ls.LitServer(model, accelerator="cpu", workers_per_device=WORKERS, fast_queue=True, timeout=60)
    server.run(host="127.0.0.1", port=port(), generate_client_file=False, log_level="warning")
