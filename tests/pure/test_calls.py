"""Runs that share forwards: what fits is merged, nobody gets another's answer, and who fails or leaves goes alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import Cancelled, OutOfMemory
from models.base import Item, Output
from models.calls import Call, CallAdapter, lacks_memory

torch.set_num_threads(1)


class Twice(CallAdapter):
    """Its network doubles. An item's `asks` are lists of row shapes (calls of one list) or single shapes, asked one
    after the other; its result is the sum of what it was told."""

    def __init__(self, **options):
        super().__init__(options, torch.device("cpu"))
        self.forwards: list[tuple[int, ...]] = []
        self.poison: Callable[[torch.Tensor], Exception | None] = lambda _: None

    def start(self, item):
        value, total = item.params["value"], 0.0
        for ask in item.params["asks"]:
            if isinstance(ask, list):
                answers = yield [call(value, *shape) for shape in ask]
                assert isinstance(answers, list) and [one.shape[1:] for one in answers] == [torch.Size(s) for s in ask]
                total += sum(float(one.sum()) for one in answers)
            else:
                answer = yield call(value, *ask)
                assert answer.shape == (1, *ask)
                total += float(answer.sum())
        return Output(facts={"total": total})

    def forward(self, network, *inputs):
        (rows,) = inputs
        self.forwards.append(tuple(rows.shape))
        if fault := self.poison(rows):
            raise fault
        return rows * 2

    def totals(self, *items):
        return [one.facts["total"] if isinstance(one, Output) else one for one in self.run(items)]


def call(value, *shape):
    return Call("net", (torch.full((1, *shape), float(value)),))


def job(value, *asks, **more):
    return Item({"value": value, "asks": asks}, **more)


def test_calls_of_one_shape_share_a_forward_and_everybody_gets_his_own():
    model = Twice()
    assert model.totals(job(1, (2,)), job(10, (2,)), job(100, (2,))) == [4, 40, 400]
    assert model.forwards == [(3, 2)]


def test_other_shapes_and_other_types_have_forwards_of_their_own():
    model = Twice()
    assert model.totals(job(1, (2,)), job(1, (3,)), job(1, (2,))) == [4, 6, 4]
    assert model.forwards == [(2, 2), (1, 3)]
    narrow = Call("net", (torch.ones((1, 2), dtype=torch.float16),))
    assert narrow.key != call(1, 2).key != Call("other", (torch.ones(1, 2),)).key


def test_the_calls_of_one_list_share_a_forward_too_and_come_back_in_order():
    model = Twice()
    assert model.totals(job(1, [(2,), (3,), (2,)]), job(5, (3,))) == [14, 30]
    assert model.forwards == [(2, 2), (2, 3)]


def test_runs_of_different_length_meet_again_and_again():
    model = Twice()
    assert model.totals(job(1, (2,), (2,), (2,)), job(2, (2,)), job(3, (2,), (2,))) == [12, 8, 24]
    assert model.forwards == [(3, 2), (2, 2), (1, 2)]


def test_a_run_that_asks_for_nothing_or_for_an_empty_list_ends():
    model = Twice()
    assert model.totals(job(1), job(2, []), job(3, [], (2,))) == [0, 0, 12]
    assert model.forwards == [(1, 2)]


def test_no_forward_has_more_rows_than_allowed():
    model = Twice(max_rows=2)
    assert model.totals(*(job(n, (2,)) for n in range(5))) == [0, 4, 8, 12, 16]
    assert model.forwards == [(2, 2), (2, 2), (1, 2)]


def test_one_call_with_more_rows_than_allowed_runs_all_the_same():
    class Wide(Twice):
        def start(self, item):
            answer = yield Call("net", (torch.ones(3, 2),))
            return Output(facts={"total": float(answer.sum())})

    model = Wide(max_rows=2)
    assert model.totals(job(1), job(1)) == [12, 12] and model.forwards == [(3, 2), (3, 2)]


def test_answers_of_several_tensors_are_split_alike():
    class Pair(Twice):
        def start(self, item):
            doubled, signs = yield call(item.params["value"], 2)
            return Output(facts={"total": float(doubled.sum() * signs)})

        def forward(self, network, rows):
            return rows * 2, rows[:, 0].sign()

    assert Pair().totals(job(3, ()), job(-5, ())) == [12, 20]


def test_a_run_that_raises_fails_alone():
    class Frail(Twice):
        def start(self, item):
            answer = yield call(item.params["value"], 2)
            if item.params["value"] == 2:
                raise ValueError("two")
            return Output(facts={"total": float(answer.sum())})

    first, second, third = Frail().totals(job(1), job(2), job(3))
    assert (first, third) == (4, 12) and isinstance(second, ValueError)


def test_a_run_that_fails_before_its_first_call_fails_alone():
    class Frail(Twice):
        def start(self, item):
            if item.params["value"] == 2:
                raise ValueError("two")
            return (yield from super().start(item))

    first, second = Frail().totals(job(2, (2,)), job(3, (2,)))
    assert isinstance(first, ValueError) and second == 12


def test_a_run_without_an_output_is_told_as_an_exception():
    class Silent(Twice):
        def start(self, item):
            yield call(1, 2)

    (told,) = Silent().totals(job(1))
    assert isinstance(told, TypeError)


def test_a_forward_that_raises_is_repeated_one_by_one_so_that_only_the_guilty_run_fails():
    model = Twice()
    model.poison = lambda rows: RuntimeError("poison") if (rows == 2).any() else None
    first, second, third = model.totals(job(1, (2,), (2,)), job(2, (2,)), job(3, (2,), (2,)))
    assert (first, third) == (8, 24) and isinstance(second, RuntimeError)
    assert model.forwards == [(3, 2), (1, 2), (1, 2), (1, 2), (2, 2)], "and afterwards they meet again"


def test_of_a_list_of_calls_one_that_fails_ends_the_run_and_the_others_are_not_made():
    model = Twice(max_rows=1)
    model.poison = lambda rows: RuntimeError("poison") if rows.shape[1] == 3 else None
    first, second = model.totals(job(1, [(3,), (2,), (4,)]), job(2, (2,)))
    assert isinstance(first, RuntimeError) and second == 8
    assert model.forwards == [(1, 3), (1, 2)]


def test_a_run_may_live_with_a_call_that_failed_and_ask_for_another():
    class Second(Twice):
        def start(self, item):
            try:
                answer = yield call(item.params["value"], 3)
            except RuntimeError:
                answer = yield call(item.params["value"], 2)
            return Output(facts={"total": float(answer.sum())})

    model = Second()
    model.poison = lambda rows: RuntimeError("poison") if rows.shape[1] == 3 else None
    assert model.totals(job(1), job(2)) == [4, 8]


@pytest.mark.parametrize("fault", [
    torch.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError(),
    RuntimeError("The following operation failed in the TorchScript interpreter ... CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
])  # fmt: skip
def test_a_forward_that_does_not_fit_is_halved_and_the_bound_is_remembered(fault):
    model = Twice()
    model.poison = lambda rows: fault if rows.numel() > 6 else None
    assert lacks_memory(fault)
    assert model.totals(*(job(n, (2,)) for n in range(8))) == [4 * n for n in range(8)]
    assert model.forwards == [(8, 2), (4, 2), *[(2, 2)] * 4]
    model.forwards.clear()
    assert model.totals(*(job(n, (4,)) for n in range(2))) == [0, 8]
    assert model.forwards == [(1, 4)] * 2, "larger shapes know it too"


def test_a_call_that_does_not_fit_alone_fails_its_run_with_a_sentence_and_no_other():
    model = Twice()
    model.poison = lambda rows: MemoryError() if rows.numel() > 6 else None
    first, second = model.totals(job(1, (9,)), job(2, (2,)))
    assert isinstance(first, OutOfMemory) and "smaller" in first.message and second == 8


def test_a_cancelled_run_leaves_before_the_next_forward():
    model, gone = Twice(), []
    leaver = job(1, (2,), (2,), cancelled=lambda: bool(gone))
    forward = model.forward
    model.forward = lambda *given: (gone.append(True), forward(*given))[1]
    first, second = model.totals(leaver, job(2, (2,), (2,)))
    assert isinstance(first, Cancelled) and second == 16
    assert model.forwards == [(2, 2), (1, 2)]


def test_a_run_cancelled_from_the_start_costs_no_forward_and_closes_its_coroutine():
    closed = []

    class Tidy(Twice):
        def start(self, item):
            try:
                yield from super().start(item)
            finally:
                closed.append(True)

    model = Tidy()
    (told,) = model.totals(job(1, [(2,), (3,)], cancelled=lambda: True))
    assert isinstance(told, Cancelled) and not model.forwards and closed == [True]


def test_two_forwards_may_be_on_their_way_at_once_and_still_nobody_gets_anothers_answer(monkeypatch):
    """As on a GPU, where the next forward is started before the answer of the last is read."""
    model, log = Twice(), []

    class Event:
        def __init__(self):
            log.append("started")

        def synchronize(self):
            log.append("awaited")

    model.device = torch.device("cuda")
    monkeypatch.setattr(model, "_mark", Event)
    monkeypatch.setattr(model, "_merge", lambda calls: [torch.cat([one.inputs[0] for one in calls])])
    assert model.totals(job(1, (2,), (3,)), job(2, (3,), (2,)), job(3, (4,))) == [10, 20, 24]
    assert log[:3] == ["started", "started", "awaited"] and log.count("started") == log.count("awaited") == len(
        model.forwards
    )


shapes = st.sampled_from([(1,), (2,), (2, 2)])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.one_of(shapes, st.lists(shapes, max_size=4)), max_size=4), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_whatever_is_asked_in_whatever_company_the_result_is_that_of_the_run_alone(asks, rows):
    items = [job(2**n, *ask) for n, ask in enumerate(asks)]
    together = Twice(max_rows=rows)
    assert together.totals(*items) == [Twice().totals(one)[0] for one in items]
    assert all(shape[0] <= rows for shape in together.forwards)
    flat = [shape for ask in asks for one in ask for shape in (one if isinstance(one, list) else [one])]
    assert sum(shape[0] for shape in together.forwards) == len(flat), "no call is made twice or forgotten"


def test_what_has_ended_is_handed_over_while_others_still_run():
    model, told = Twice(), []

    def noting(name, *asks, **more):
        return job(1, *asks, done=lambda end: told.append((name, len(model.forwards), type(end))), **more)

    gone = Cancellable()
    long = noting("long", (2,), (2,), (2,))
    outputs = model.run([long, noting("short", (2,)), noting("none"), noting("left", (2,), (2,), cancelled=gone)])
    assert told == [("none", 0, Output), ("short", 1, Output), ("left", 1, Cancelled), ("long", 3, Output)]
    assert [type(one) for one in outputs] == [Output, Output, Output, Cancelled], "and all are returned, too"


class Cancellable:
    """Says yes from the second time on that it is asked."""

    asked = 0

    def __call__(self):
        self.asked += 1
        return self.asked > 1


def test_a_failure_is_handed_over_once():
    model, told = Twice(), []
    model.poison = lambda rows: ValueError("no thirteens") if (rows == 13).any() else None
    items = [job(value, (2,), done=told.append) for value in (13, 1)]
    ends = model.run(items)
    assert sorted(map(id, told)) == sorted(map(id, ends)) and isinstance(ends[0], ValueError)
