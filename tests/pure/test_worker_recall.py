"""A worker that is asked for what it has not begun of a batch."""

from __future__ import annotations

import os

import numpy as np
from test_worker_session import Bench

from models.base import Adapter, Output
from models.checkpoint import in_parts
from workers.drops import Drops
from workers.messages import BatchDone, ItemsDone, RunBatch


class OneByOne(Adapter):
    """The batch is asked back while its second item runs."""

    session = None

    def run(self, items):
        return in_parts(([item] for item in items), self._one)

    def _one(self, part):
        self.count = getattr(self, "count", 0) + 1
        if self.session is not None and self.count == 2:
            self.session._dropped.recall(1)
        return [Output(np.full_like(part[0].image, 7))]


def test_what_is_not_begun_of_a_recalled_batch_goes_back_and_the_rest_is_answered(tmp_path):
    bench = Bench(tmp_path, OneByOne)
    bench.adapter.session = bench.session
    said = bench.run(*(bench.item(name) for name in "abcd"))
    answered = [done.job for message in said if isinstance(message, ItemsDone) for done in message.items]
    assert sorted(answered) == ["a", "b"] and set(said[-1].returned) == {"c", "d"}
    assert not bench.session._dropped and bench.adapter.count == 2


def test_a_batch_that_is_recalled_before_it_begins_goes_back_whole_but_for_what_failed(tmp_path):
    bench = Bench(tmp_path, OneByOne)
    items = [bench.item("good"), bench.item("broken", b"no picture at all")]
    prepared = bench.session._prepare(RunBatch(1, "stub", tuple(items)))
    bench.session._dropped.hold(1)
    bench.session._dropped.recall(1)
    bench.session._compute(prepared)
    said = []
    while not (said and isinstance(said[-1], BatchDone)):
        said += bench.frames.feed(os.read(bench.results.fileno(), 1 << 18))
    assert [done.job for one in said if isinstance(one, ItemsDone) for done in one.items] == ["broken"]
    assert said[-1].returned == ("good",)


def test_a_batch_that_has_ended_is_not_recalled():
    drops = Drops()
    drops.hold(1)
    drops.forget(1)
    drops.recall(1)
    assert not drops.recalled(1)
    drops.hold(2)
    drops.recall(2)
    assert drops.recalled(2)
    drops.forget(2)
    assert not drops.recalled(2)
