"""The floors of the building: who may import whom, what stays out of the master, and what lies at the top.

    4 server.py   3 api   2 engine   1 scheduler, workers, models, store   0 core

Siblings on floor 1 do not know each other, but for the worker's child process, which runs the models.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "core": set(),
    "scheduler": {"core"},
    "workers": {"core"},
    "models": {"core"},
    "store": {"core"},
    "engine": {"core", "scheduler", "workers", "store"},
    "api": {"core", "engine"},
    "server": {"core", "scheduler", "workers", "store", "engine", "api"},
}
MASTER = ("core", "scheduler", "store", "engine", "api", "server")
CHILD = ("workers/process*.py", "workers/session*.py")  # they may run models
# Imported once the child has its device.
INSIDE = (
    "workers/session*.py", "workers/codecs*.py", "workers/jpeg*.py", "workers/png*.py", "workers/metadata*.py",
    "workers/watermark*.py",
)  # fmt: skip
WEB = {"fastapi", "starlette", "uvicorn"}
PIXELS = {"numpy", "cv2", "PIL", "imagecodecs"}
IMPURE = {"asyncio", "threading", "multiprocessing", "subprocess", "time", "socket"}
TOP = ("server.py", "test_concurrency.py", "requirements.txt", "README.md", "workers", "scheduler", "outputs", "tests")
LONGEST = 500
REQUIREMENTS = ("requirements.txt", "requirements-diffusion.txt")
OPTIONAL = {"modelscope", "spandrel", "torchao"}  # for models that the operator adds


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """(top package, line, runs at import) of every import of a module."""
    late = {
        inner
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        yield from ((name.partition(".")[0], node.lineno, node not in late) for name in names)


def faults(path: str, source: str) -> list[str]:
    """Every import of this file that its floor forbids, as sentences."""
    package = PurePosixPath(path).parts[0].removesuffix(".py")
    child, inside = matches(path, CHILD), matches(path, INSIDE)
    found = []
    for name, line, at_import in imports(ast.parse(source)):
        allowed = MAY_IMPORT[package] | {package} | ({"models"} if child else set())
        if name in MAY_IMPORT and name not in allowed:
            found.append(f"{path}:{line}: {package} must not import {name}")
        at_home = package == "models" or (child and (inside or not at_import))
        if name in ("torch", "torchvision", "diffusers") and not at_home:
            found.append(f"{path}:{line}: {name} belongs to models/ and, once it has its device, to the worker's child")
        if name in WEB and package not in ("api", "server"):
            found.append(f"{path}:{line}: {name} is known to api/ alone")
        if name in PIXELS and (package in MASTER or (package == "workers" and at_import and not inside)):
            found.append(f"{path}:{line}: the master touches no pixels; {name} belongs to the worker")
        if name in IMPURE and package == "scheduler" and at_import:
            found.append(f"{path}:{line}: the scheduler is pure; {name} is not")
        if name == "pynvml" and at_import:
            found.append(f"{path}:{line}: pynvml is asked for late, it may be missing")
    return found


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(PurePosixPath(path).match(pattern) for pattern in patterns)


def ours(*folders: str) -> list[Path]:
    places = [ROOT / folder for folder in folders]
    return sorted(
        file
        for place in places
        for file in ([place.with_suffix(".py")] if place.with_suffix(".py").exists() else place.rglob("*.py"))
    )


def test_nobody_imports_from_a_floor_above_or_beside() -> None:
    files = ours(*MAY_IMPORT)
    assert len(files) > 20
    found = [fault for file in files for fault in faults(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        ("core/job.py", "import scheduler.events", "core must not import scheduler"),
        ("scheduler/pace.py", "from workers import messages", "scheduler must not import workers"),
        ("workers/pool.py", "def f():\n    from models.base import Item", "workers must not import models"),
        ("workers/process.py", "from scheduler import events", "workers must not import scheduler"),
        ("workers/process.py", "import torch", "torch belongs to models/"),
        ("workers/pool.py", "def f():\n    import torch", "torch belongs to models/"),
        ("workers/codecs.py", "def f():\n    import torch", "torch belongs to models/"),
        ("workers/pool.py", "import numpy", "the master touches no pixels"),
        ("engine/engine.py", "from models import base", "engine must not import models"),
        ("engine/engine.py", "from starlette.requests import Request", "starlette is known to api/ alone"),
        ("api/jobs.py", "import store.files", "api must not import store"),
        ("api/jobs.py", "def f():\n    import numpy as np", "the master touches no pixels"),
        ("engine/engine.py", "class A:\n    import PIL.Image", "the master touches no pixels"),
        ("store/jobs.py", "import engine", "store must not import engine"),
        ("models/lama.py", "from workers.codecs import decode", "models must not import workers"),
        ("scheduler/pace.py", "import time", "the scheduler is pure"),
        ("workers/monitor.py", "import pynvml", "pynvml is asked for late"),
        ("server.py", "import models.base", "server must not import models"),
    ],
)
def test_an_offence_would_be_found(path: str, source: str, sentence: str) -> None:
    (found,) = faults(path, source)
    assert sentence in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("workers/session.py", "from models.base import Item\ndef f():\n    import torch"),
        ("workers/session.py", "import torch"),
        ("workers/codecs.py", "import numpy, cv2"),
        ("models/lama.py", "import torch, numpy"),
        ("engine/engine.py", "from scheduler.events import Tick\nfrom workers import pool\nimport store.jobs, asyncio"),
        ("api/app.py", "import fastapi\nfrom engine.engine import Engine\nfrom . import jobs"),
        ("scheduler/pace.py", "from scheduler.events import Tick\nfrom core.ticket import Ticket"),
        ("server.py", "import uvicorn\nfrom api.app import create_app"),
    ],
)
def test_what_is_allowed_is_not_blamed(path: str, source: str) -> None:
    assert faults(path, source) == []


def test_importing_the_whole_master_leaves_torch_and_pixels_out() -> None:
    files = [file.relative_to(ROOT) for file in ours(*MASTER, "workers")]
    files = [file for file in files if not matches(file.as_posix(), INSIDE)]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted({PIXELS | {'torch', 'models'}!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_what_is_imported_is_in_the_requirements() -> None:
    named = [line for name in REQUIREMENTS for line in (ROOT / name).read_text("utf-8").lower().splitlines()]
    pinned = {line.partition("==")[0].partition("[")[0].replace("_", "-") for line in named if "==" in line}
    providers = packages_distributions()
    used = {name for file in ours(*MAY_IMPORT) for name, *_ in imports(ast.parse(file.read_text("utf-8")))}
    outside = used - set(sys.stdlib_module_names) - set(MAY_IMPORT) - {"tests", "bench"}
    missing = {
        name for name in outside if not pinned & {one.lower().replace("_", "-") for one in providers.get(name, ())}
    }
    assert not missing - OPTIONAL, "imported, but not in the requirements"


def test_no_file_is_too_long_to_be_one_idea() -> None:
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in ours(*MAY_IMPORT, "tests", "bench")}
    assert not {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines > LONGEST}


def test_every_module_says_at_its_head_what_it_is() -> None:
    bare = [file for file in ours(*MAY_IMPORT) if not ast.get_docstring(ast.parse(file.read_text("utf-8")))]
    assert not [str(file.relative_to(ROOT)) for file in bare]


def test_no_committed_file_knows_the_machine_it_was_written_on() -> None:
    if len(ROOT.parts) < 3 or not (ROOT / ".git").exists():
        pytest.skip("not a checkout under a path that could be recognised")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    words = [f"{ROOT}/".encode(), f"{ROOT.parent}/shared".encode(), b"../" + b"shared"]
    found = [file for file in files if file.is_file() and any(word in file.read_bytes() for word in words)]
    assert not [str(file.relative_to(ROOT)) for file in found]


@pytest.mark.parametrize("name", TOP)
def test_the_prescribed_top_level_is_there(name: str) -> None:
    assert (ROOT / name).exists()
