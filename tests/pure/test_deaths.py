"""Whose doing a process's end is."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from workers.deaths import blamed_on, is_stopped, oom_kills


@pytest.mark.parametrize(("code", "frozen", "before", "after", "whose"), [
    (-signal.SIGKILL, False, 3, 3, "killed"),
    (-signal.SIGKILL, False, 3, 4, "memory"),
    (-signal.SIGKILL, False, None, None, "memory"),
    (-signal.SIGKILL, True, 3, 4, "killed"),
    (-signal.SIGTERM, False, 3, 4, "killed"),
    (-signal.SIGSEGV, False, 3, 3, "died"),
    (1, False, 3, 3, "died"),
    (None, False, 3, 3, "died"),
])  # fmt: skip
def test_whose_doing_it_is(code, frozen, before, after, whose):
    assert blamed_on(code, frozen=frozen, before=before, after=after) == whose


def test_a_kill_by_somebody_else_is_not_counted_as_one_for_memory_and_a_stopped_process_is_seen():
    before = oom_kills()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not is_stopped(child.pid)
        child.send_signal(signal.SIGSTOP)
        while not is_stopped(child.pid):
            pass
        child.kill()
    assert oom_kills() == before
    assert not is_stopped(child.pid) and not is_stopped(None)
