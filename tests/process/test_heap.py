"""The heap keeps what the next request asks for again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from core.heap import keep_heap

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import resource, sys
from core.heap import keep_heap
if sys.argv[1] == "keep":
    assert keep_heap()
def turn():
    held = [bytes(500_000) for _ in range(8)]
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, word], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_heap(), reason="the C library is not glibc")
def test_memory_of_finished_requests_is_used_again() -> None:
    assert faults("keep") < faults("leave") / 10
