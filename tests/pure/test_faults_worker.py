"""What a worker's models and images may do to it, without its process."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import tracemalloc

import numpy as np
import pytest
from engine_kit import png
from PIL import Image
from test_worker_session import Bench

from core.errors import InvalidImage
from core.header import read_header
from models.base import Adapter, Output
from workers import codecs
from workers.messages import BatchDone, Finished, RunBatch
from workers.session import Prepared

SECRET = "/srv/models/secret.safetensors"


@pytest.mark.parametrize("fault", [RuntimeError, KeyError, OSError, PermissionError, AssertionError, RecursionError])
def test_a_models_exception_is_logged_with_its_trace_and_told_without(tmp_path, capfd, fault):
    class Faulty(Adapter):
        def run(self, items):
            raise fault(SECRET)

    bench = Bench(tmp_path, Faulty)
    answers = bench.answers(bench.item("a"))
    told = answers["a"].error
    assert told.code == "model_failed" and "log" in told.message
    assert SECRET not in f"{told}" and "Traceback" not in told.message and ".py" not in told.message
    logged = capfd.readouterr().err
    assert SECRET in logged and "Traceback" in logged and "job a" in logged


def test_no_memory_for_one_image_while_it_is_decoded_fails_that_job_alone(tmp_path, monkeypatch):
    class Model(Adapter):
        def run(self, items):
            return [Output(np.full_like(item.image, 7)) for item in items]

    real = codecs.decode

    def decode(data, header, **more):
        if len(data) == len(large):
            raise MemoryError
        return real(data, header, **more)

    large = png(1, 64, 64)
    monkeypatch.setattr(codecs, "decode", decode)
    bench = Bench(tmp_path, Model)
    answers = bench.answers(bench.item("small"), bench.item("large", large))
    assert answers["small"].error is None
    assert answers["large"].error.code == "out_of_memory" and "smaller" in answers["large"].error.message


def test_no_memory_while_a_result_is_encoded_fails_that_job_alone(tmp_path, monkeypatch):
    class Model(Adapter):
        def run(self, items):
            return [Output(np.full_like(item.image, number)) for number, item in enumerate(items, 1)]

    real = codecs.encode

    def encode(image, *given, **more):
        if image[0, 0, 0] == 2:
            raise MemoryError
        return real(image, *given, **more)

    monkeypatch.setattr(codecs, "encode", encode)
    bench = Bench(tmp_path, Model)
    answers = bench.answers(bench.item("a"), bench.item("b"), bench.item("c"))
    assert answers["b"].error.code == "out_of_memory"
    assert answers["a"].error is None and answers["c"].error is None


def test_the_end_of_a_batch_never_overtakes_an_answer_of_its_own(tmp_path):
    """Codec threads answer at once: the master takes what is unanswered at the batch's end for lost."""
    bench = Bench(tmp_path)
    said, speaking, overtaken = [], threading.Event(), threading.Event()

    class Slow:
        def send(self, *messages):
            if speaking.is_set():
                overtaken.set()
            else:
                speaking.set()
                overtaken.wait(0.5)
            said.extend(messages)

    bench.session._channel = Slow()
    batch = RunBatch(1, "stub", (bench.item("a"), bench.item("b")))
    prepared = Prepared(batch, 0.0, [], unanswered=2)
    threads = [threading.Thread(target=bench.session._answer, args=(prepared, Finished(job))) for job in "ab"]
    threads[0].start()
    speaking.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert [item.job for message in said[:-1] for item in message.items] == ["a", "b"]
    assert said[-1] == BatchDone(1, 0.0)


def one_tiff() -> bytes:
    """10,000 directories in a chain."""
    out = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number in range(10_000):
        at = len(out) + 2 + 12 + 4
        out += struct.pack("<HHHII", 1, 256, 3, 1, 1) + struct.pack("<I", at if number < 9_999 else 0)
    return bytes(out)


def saved(format: str, **more: object) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 90, 200)]
    frames[0].save(file, format, save_all=True, append_images=frames[1:], **more)
    return file.getvalue()


def many_gif() -> bytes:
    data = saved("GIF")
    frame = data.rindex(b"\x21\xf9")
    return data[:-1] + data[frame:-1] * 10_000 + b";"


def many_webp() -> bytes:
    data = saved("WEBP")
    first = data.index(b"ANMF")
    (size,) = struct.unpack_from("<I", data, first + 4)
    body = data[8:] + data[first : first + 8 + size + size % 2] * 10_000
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_apng() -> bytes:
    data = saved("PNG")
    start, end = data.index(b"fcTL", data.index(b"fdAT")) - 4, data.index(b"IEND") - 4
    return data[:end] + data[start:end] * 5_000 + data[end:]


@pytest.mark.parametrize("make", [one_tiff, many_gif, many_webp, many_apng])
def test_ten_thousand_frames_are_not_looked_at(make):
    data = make()
    assert len(data) > 150_000
    tracemalloc.start()
    try:
        with contextlib.suppress(InvalidImage):  # too many chunks, or a first directory without a size
            assert read_header(data).width == 8
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()
