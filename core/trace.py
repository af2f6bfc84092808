"""What belongs to one request, from the door to the end of its jobs, so that their lines in the log can be told apart.

It lies in a context variable: what a request's task starts has it too, however many calls lie between.
"""

from __future__ import annotations

from contextvars import ContextVar


class Trace:
    """One request: its id, and the ids of the jobs that were made for it. `caller` is what it has in common with itself
    when it comes back after it was refused, and, as far as can be seen, with no other."""

    __slots__ = ("caller", "jobs", "request")

    def __init__(self, request: str, caller: str = "") -> None:
        self.request, self.caller = request, caller
        self.jobs: list[str] = []


CURRENT: ContextVar[Trace | None] = ContextVar("imagepool_request", default=None)


def caller() -> str:
    """Of the request for which this runs; "" when it runs for none."""
    trace = CURRENT.get()
    return trace.caller if trace else ""
