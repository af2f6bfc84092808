"""How long encoding and decoding takes with every library that could do it, and how many bytes come out.

    python -m bench.codecs [--rounds 9] [--sizes 512 1024]

Candidates take turns in every round; figures are medians with their range, in milliseconds of one thread. Libraries
that are not installed are left out. Writes bench/results/codecs.json and codecs.png.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import cv2
import imagecodecs
import matplotlib as mpl
import numpy as np
import simplejpeg
from isal import isal_zlib
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.common import RESULTS, machine_facts, photograph, write_result
from core.header import read_header
from workers.codecs import decode, encode

OURS = "ImagePool"
PACKAGES = ("numpy", "pillow", "isal", "imagecodecs", "simplejpeg", "opencv-python-headless", "zlib-ng", "fpng")

Work = Callable[[], Any]


def pillow(image: np.ndarray, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()


def opencv(image: np.ndarray, suffix: str, *options: int) -> bytes:
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def ours(data: bytes) -> np.ndarray:
    return decode(data, read_header(data)).image


def png_encoders(image: np.ndarray) -> dict[str, Work]:
    level, strategy, rows = cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_FILTER
    found: dict[str, Work] = {
        OURS: lambda: encode(image),
        "Pillow, level 6 (default)": lambda: pillow(image, "PNG"),
        "Pillow, level 1": lambda: pillow(image, "PNG", compress_level=1),
        "OpenCV, default": lambda: opencv(image, ".png"),
        "OpenCV, level 1": lambda: opencv(image, ".png", level, 1),
        "OpenCV, level 1, Huffman": lambda: opencv(image, ".png", level, 1, strategy, 2),
        "OpenCV, level 1, RLE, average": lambda: opencv(image, ".png", level, 1, strategy, 3, rows, 64),
        "imagecodecs libpng, level 1": lambda: imagecodecs.png_encode(image, level=1),
        "imagecodecs libpng, Huffman, average": lambda: imagecodecs.png_encode(image, level=1, strategy=2, filter=64),
        "imagecodecs spng, level 1": lambda: imagecodecs.spng_encode(image, level=1),
    }
    try:
        import fpng

        found["fpng"] = lambda: fpng.from_ndarray(image)
    except ImportError:
        pass
    return found | deflaters(image)


def deflaters(image: np.ndarray) -> dict[str, Work]:
    """Our own PNG writer around other deflate libraries, to show what the choice of igzip gives."""
    from workers import png

    def around(compress: Callable[[np.ndarray], bytes]) -> Work:
        def write() -> bytes:
            rows = image.reshape(image.shape[0], -1)
            parts = [png.SIGNATURE, *png._chunk(b"IHDR", bytes(13))]
            parts += png._chunk(b"IDAT", compress(png._filter(rows, 3)))
            return b"".join((*parts, *png._chunk(b"IEND", b"")))

        return write

    found = {"our writer, libdeflate 1": around(lambda rows: imagecodecs.deflate_encode(rows, level=1, raw=False))}
    try:
        from zlib_ng import zlib_ng

        found["our writer, zlib-ng 1"] = around(lambda rows: zlib_ng.compress(rows, 1))
    except ImportError:
        pass
    return found


def decoders(data: bytes, *more: tuple[str, Callable[[bytes], Any]]) -> dict[str, Work]:
    found: dict[str, Work] = {
        OURS: lambda: ours(data),
        "Pillow": lambda: np.asarray(Image.open(io.BytesIO(data))),
        "OpenCV": lambda: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR),
    }
    return found | {name: (lambda work=work: work(data)) for name, work in more}


def groups(image: np.ndarray) -> dict[str, dict[str, Work]]:
    quality = cv2.IMWRITE_JPEG_QUALITY
    libpng = ("imagecodecs libpng", imagecodecs.png_decode), ("imagecodecs spng", imagecodecs.spng_decode)
    return {
        "PNG encode": png_encoders(image),
        "PNG decode, written by Pillow": decoders(pillow(image, "PNG"), *libpng),
        "PNG decode, written by ImagePool": decoders(encode(image), *libpng),
        "JPEG encode, quality 90": {
            OURS: lambda: encode(image, "jpeg", quality=90),
            "Pillow": lambda: pillow(image, "JPEG", quality=90),
            "OpenCV": lambda: opencv(image, ".jpg", quality, 90),
            "imagecodecs": lambda: imagecodecs.jpeg8_encode(image, level=90),
        },
        "JPEG decode, quality 95": decoders(
            pillow(image, "JPEG", quality=95),
            ("simplejpeg", simplejpeg.decode_jpeg), ("imagecodecs", imagecodecs.jpeg8_decode),
        ),
        "WebP encode, quality 90": {
            OURS: lambda: encode(image, "webp", quality=90),
            **{f"Pillow, method {m}": (lambda m=m: pillow(image, "WEBP", quality=90, method=m)) for m in (0, 2, 4, 6)},
            "OpenCV": lambda: opencv(image, ".webp", cv2.IMWRITE_WEBP_QUALITY, 90),
        },
        "WebP decode": decoders(pillow(image, "WEBP", quality=90), ("imagecodecs", imagecodecs.webp_decode)),
        "AVIF encode, quality 75": {
            OURS: lambda: encode(image, "avif", quality=75),
            **{f"Pillow, speed {s}": (lambda s=s: pillow(image, "AVIF", quality=75, speed=s, max_threads=1))
               for s in (6, 8, 10)},
            "imagecodecs, speed 10": lambda: imagecodecs.avif_encode(image, level=75, speed=10, numthreads=1),
        },
        "AVIF decode": decoders(
            encode(image, "avif"), ("imagecodecs", lambda data: imagecodecs.avif_decode(data, numthreads=1))
        ),
    }  # fmt: skip


def measure(works: Mapping[str, Work], rounds: int, tick: Callable[[], None]) -> dict[str, dict[str, float]]:
    taken: dict[str, list[float]] = {name: [] for name in works}
    sizes = {name: len(out) if isinstance(out := work(), bytes | bytearray) else 0 for name, work in works.items()}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.thread_time()
            work()
            taken[name].append(1e3 * (time.thread_time() - start))
            tick()
    return {
        name: {"ms": round(statistics.median(times), 3), "min": round(min(times), 3), "max": round(max(times), 3)}
        | ({"bytes": sizes[name]} if sizes[name] else {})
        for name, times in taken.items()
    }


def frees_gil(work: Work) -> bool:
    """Whether another Python thread gets on while `work` runs. No clock decides: with an endless switch interval a
    thread runs only when the one before it lets go by itself."""
    interval, counted, got_on = sys.getswitchinterval(), [0], [False]

    def other() -> None:
        before = counted[0]
        for _ in range(500):  # on a busy machine the other thread may be too late to take the GIL
            work()
            if counted[0] > before:
                got_on[0] = True
                return

    sys.setswitchinterval(60)
    try:
        thread = threading.Thread(target=other)
        thread.start()
        counted[0] += 1
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    return got_on[0]


def gil(image: np.ndarray) -> dict[str, bool]:
    """For every call into a library that we make, and for fpng."""
    raw, packed = image.tobytes(), isal_zlib.compress(image, 1)
    files = {kind: encode(image, kind) for kind in ("png", "jpeg", "webp", "avif")}
    works: dict[str, Work] = {
        "igzip compress": lambda: isal_zlib.compress(raw, 1),
        "igzip inflate": lambda: isal_zlib.decompressobj().decompress(packed, len(raw)),
        "libpng decode": lambda: imagecodecs.png_decode(files["png"]),
        "simplejpeg encode": lambda: simplejpeg.encode_jpeg(image, 90),
        "simplejpeg decode": lambda: simplejpeg.decode_jpeg(files["jpeg"]),
        "libwebp decode": lambda: imagecodecs.webp_decode(files["webp"]),
        "Pillow WebP encode": lambda: pillow(image, "WEBP"),
        "Pillow AVIF encode": lambda: pillow(image, "AVIF", speed=9),
        "Pillow AVIF decode": lambda: Image.open(io.BytesIO(files["avif"])).load(),
    }
    works |= {name: work for name, work in png_encoders(image).items() if "fpng" in name}
    return {name: frees_gil(work) for name, work in works.items()}


def draw(sizes: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(next(iter(sizes.values())))
    heights = [len(next(iter(sizes.values()))[name]) + 1.5 for name in names]
    figure, axes = plt.subplots(
        len(names), len(sizes), figsize=(7 * len(sizes), sum(heights) * 0.27), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for column, (size, found) in enumerate(sizes.items()):
        for row, name in enumerate(names):
            axis = axes[row][column]
            order = sorted(found[name], key=lambda key: -found[name][key]["ms"])
            values = [found[name][key]["ms"] for key in order]
            bars = axis.barh(order, values, color=["#d1495b" if key == OURS else "#9fb4c7" for key in order])
            labels = [f" {found[name][key]['ms']:.1f} ms" for key in order]
            if "bytes" in found[name][OURS]:
                labels = [f"{ms}, {found[name][key]['bytes'] >> 10} KiB" for key, ms in zip(order, labels, strict=True)]
            axis.bar_label(bars, labels, fontsize=7)
            axis.set_title(f"{name}, {size}²", fontsize=9, loc="left")
            axis.set_xlim(0, max(values) * 1.3)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "codecs.png", dpi=110)


def show(console: Console, size: str, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    for name, results in found.items():
        table = Table("library", "ms", "range", "bytes", "time vs ours", title=f"{name}, {size}²", title_justify="left")
        for key, one in sorted(results.items(), key=lambda pair: pair[1]["ms"]):
            table.add_row(
                key, f"{one['ms']:.2f}", f"{one['min']:.2f}–{one['max']:.2f}",
                f"{one['bytes']:,}" if "bytes" in one else "",
                f"{one['ms'] / results[OURS]['ms']:.2f}", style="bold" if key == OURS else "",
            )  # fmt: skip
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    given = parser.parse_args()
    cv2.setNumThreads(1)
    console, sizes = Console(), {}
    with Progress(console=console) as progress:
        for side in given.sizes:
            todo = groups(photograph(side))
            task = progress.add_task(f"{side}²", total=given.rounds * sum(map(len, todo.values())))
            tick = partial(progress.advance, task)
            sizes[str(side)] = {name: measure(works, given.rounds, tick) for name, works in todo.items()}
    for size, found in sizes.items():
        show(console, size, found)
    free = gil(photograph(512))
    console.print("Frees the GIL:", free)
    result = {"rounds": given.rounds, "unit": "CPU ms of one thread, median", "sizes": sizes, "frees_gil": free}
    console.print(f"written: {write_result('codecs', machine_facts(PACKAGES), result).name}, codecs.png")
    draw(sizes)


if __name__ == "__main__":
    main()
