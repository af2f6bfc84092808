"""What a worker process has fixed before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SETTLED = """
import os
from types import SimpleNamespace
from workers.process import settle
settle(SimpleNamespace(visible="1", threads=2, cpus=()))
print(*(os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")))
"""


@pytest.mark.parametrize(("given", "policy"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_a_worker_is_shown_its_device_and_its_threads_wait_asleep_unless_told_otherwise(given, policy):
    environ = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    told = subprocess.run([sys.executable, "-c", SETTLED], env=environ, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["1", "2", policy]
