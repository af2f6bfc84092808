"""Typed queues between the master and one incarnation of a worker: two one-way pipes, nothing shared with anybody else.

Why not `multiprocessing.Queue`: a process killed in the middle of a message leaves the other side of a shared queue
blocked for good. Here each pipe has one writer and one reader, the master closes the child's ends after the start, and
so a death is the end of a file: seen at once, whatever was half sent.

A frame is a 4-byte length and a pickle of a list of messages: what was said in one turn travels in one write.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

from workers.messages import FromWorker, ToWorker

HEAD = struct.Struct("<I")
READ_SIZE = 1 << 18


def pack(messages: Iterable[object]) -> bytes:
    """One frame that holds the messages in order."""
    body = pickle.dumps(list(messages), protocol=5)
    return HEAD.pack(len(body)) + body


class Frames:
    """Cuts a stream of bytes into messages. A frame that never becomes whole never comes out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[object]:
        self._buffer += data
        messages: list[object] = []
        start = 0
        while len(self._buffer) - start >= HEAD.size:
            (length,) = HEAD.unpack_from(self._buffer, start)
            end = start + HEAD.size + length
            if len(self._buffer) < end:
                break
            messages += pickle.loads(memoryview(self._buffer)[start + HEAD.size : end].tobytes())
            start = end
        if start:
            del self._buffer[:start]
        return messages


class WorkerEnd:
    """The child's side: blocking reads in one thread, writes from any thread."""

    def __init__(self, requests: Connection, results: Connection) -> None:
        self._requests, self._results = requests, results
        self._frames = Frames()
        self._lock = threading.Lock()

    def receive(self) -> list[ToWorker]:
        """Wait for messages. Raises EOFError when the master is gone."""
        while True:
            data = os.read(self._requests.fileno(), READ_SIZE)
            if not data:
                raise EOFError("the master has closed the channel")
            if messages := self._frames.feed(data):
                return messages  # type: ignore[return-value]

    def send(self, *messages: FromWorker) -> None:
        """Say something to the master; waits while the pipe is full. A master that is gone is no error here: the
        thread that reads sees it and ends the process."""
        frame = memoryview(pack(messages))
        try:
            with self._lock:
                while frame:
                    frame = frame[os.write(self._results.fileno(), frame) :]
        except BrokenPipeError:
            pass


class MasterEnd:
    """The master's side, on its event loop: never blocks, neither on a half message nor on a worker that reads no more.

    `on_message(message)` is called for each message in order, `on_closed()` once when the worker's end is gone. What
    `on_message` raises goes to the loop's exception handler: the messages behind belong to other jobs.
    """

    def __init__(
        self,
        requests: Connection,
        results: Connection,
        on_message: Callable[[FromWorker], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._requests, self._results = requests, results
        self._on_message, self._on_closed = on_message, on_closed
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._unsent: deque[memoryview] = deque()
        self._closed = False
        os.set_blocking(requests.fileno(), False)
        os.set_blocking(results.fileno(), False)
        self._loop.add_reader(results.fileno(), self._readable)

    def send(self, *messages: ToWorker) -> None:
        """Queue messages for the worker, in order. To a dead worker it is a no-op: its loss is told elsewhere."""
        if self._closed:
            return
        waiting = bool(self._unsent)
        self._unsent.append(memoryview(pack(messages)))
        if not waiting and self._write():
            self._loop.add_writer(self._requests.fileno(), self._flush)

    def close(self) -> None:
        """Close both pipes. `on_closed` is not called any more."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._results.fileno())
        if self._unsent:
            self._loop.remove_writer(self._requests.fileno())
        self._unsent.clear()
        self._requests.close()
        self._results.close()

    def _flush(self) -> None:
        if not self._write():
            self._loop.remove_writer(self._requests.fileno())

    def _write(self) -> bool:
        """What the pipe takes now; whether something is left for later."""
        try:
            while self._unsent:
                rest = self._unsent[0][os.write(self._requests.fileno(), self._unsent[0]) :]
                if rest:
                    self._unsent[0] = rest
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return True
        except BrokenPipeError:
            self._unsent.clear()
        return False

    def _readable(self) -> None:
        try:
            data = os.read(self._results.fileno(), READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._on_closed()
            return
        for message in self._frames.feed(data):
            if self._closed:
                return
            try:
                self._on_message(message)  # type: ignore[arg-type]
            except Exception as fault:
                what = f"a message of a worker ({type(message).__name__}) could not be taken in"
                self._loop.call_exception_handler({"message": what, "exception": fault})
