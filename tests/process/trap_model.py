"""A model that ends or stops its own worker at a chosen moment of a job's life.

A trap is set by a file `<moment>.<signal>` in the folder of the option `folder`; the first process that comes to that
moment removes the file and sends itself that signal. So each trap springs once, whichever worker comes by.

Moments: load, warm-up, decode (a codec thread), batch (the device loop), encode (a codec thread), and answer: the
message that tells the results is half written.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from models.stub import Stub
from workers import codecs
from workers.channel import WorkerEnd, pack
from workers.messages import FromWorker, ItemsDone

MOMENTS = ("load", "warm-up", "decode", "batch", "encode", "answer")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
SPEC = """
adapter = "tests.process.trap_model:Trap"
task = "stub"
max_batch = 4
timeout = 3.0
[options]
folder = "{folder}"
[params.base_ms]
type = "float"
default = 5.0
"""


def write_spec(models: Path, traps: Path) -> None:
    """A model folder that offers `trap`, with its traps in another folder."""
    for folder in (models, traps):
        folder.mkdir()
    (models / "trap.toml").write_text(SPEC.format(folder=traps))


class Trap(Stub):
    def load(self) -> None:
        self._spring("load")
        decode, encode, send = codecs.decode, codecs.encode, WorkerEnd.send

        def trapped_decode(*args: Any, **options: Any) -> codecs.Picture:
            self._spring("decode")
            return decode(*args, **options)

        def trapped_encode(*args: Any, **options: Any) -> bytes:
            self._spring("encode")
            return encode(*args, **options)

        def trapped_send(channel: WorkerEnd, *messages: FromWorker) -> None:
            if any(isinstance(message, ItemsDone) for message in messages):
                frame = pack(messages)
                self._spring("answer", lambda: os.write(channel._results.fileno(), frame[: len(frame) // 2]))
            send(channel, *messages)

        codecs.decode, codecs.encode = trapped_decode, trapped_encode  # type: ignore[assignment]
        WorkerEnd.send = trapped_send  # type: ignore[method-assign]

    def warm_up(self) -> None:
        self._spring("warm-up")

    def run(self, items: Any) -> Any:
        self._spring("batch")
        return super().run(items)

    def _spring(self, moment: str, first: Any = None) -> None:
        for word, sig in SIGNALS.items():
            try:
                (Path(str(self.options["folder"])) / f"{moment}.{word}").unlink()
            except FileNotFoundError:
                continue
            if first:
                first()
            os.kill(os.getpid(), sig)
