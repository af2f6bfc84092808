"""The stepper: who waits shares, who fails or leaves goes alone, and what it tells is what happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from step_kit import CPU, Fifo, Told

from core.errors import Cancelled, OutOfMemory
from models.base import Output
from models.stepping.contract import Lane, StepCall
from models.stepping.stepper import PARKED_AFTER, Stepper


class Doubler:
    """A network that doubles. `fault(calls)` may raise; each forward takes a second of the test's clock."""

    name = "doubler"

    def __init__(self) -> None:
        self.forwards: list[list[float]] = []
        self.fault: Callable[[Sequence[StepCall]], None] = lambda _: None
        self.now = 0.0
        self.grad: list[bool] = []

    def forward(self, calls: Sequence[StepCall]) -> list[Any]:
        self.now += 1
        self.forwards.append([call.args[0] for call in calls])
        self.grad.append(torch.is_grad_enabled())
        self.fault(calls)
        return [call.args[0] * 2 for call in calls]

    def call(self, value: float, key: Any = "same", lane: Lane = Lane.DENOISE, rows: int = 1) -> StepCall:
        return StepCall(self, (value,), {}, rows, (self, key), lane)

    def run(self, value: float, steps: int, key: Any = "same", decode: bool = True):
        """Doubles so often, and then says what has come of it."""
        for _ in range(steps):
            value = yield self.call(value, key)
        if decode:
            value = yield self.call(value, ("decode", value), Lane.DECODE)
        return Output(facts={"value": value})


class Desk:
    def __init__(self, most_rows: int = 64) -> None:
        self.told, self.network, self.batcher = Told(), Doubler(), Fifo(most_rows)
        self.stepper = Stepper(CPU, self.batcher, self.told.events(), clock=lambda: self.network.now)
        self.cancelled: set[int] = set()

    def join(self, number: int, run: Any, priority: int = 2, remaining: float = 3) -> None:
        self.stepper.join(
            number, run, priority=priority, remaining=remaining, cancelled=lambda: number in self.cancelled
        )

    def finish(self) -> dict[int, Any]:
        for _ in range(500):
            if not self.stepper.busy:
                assert not self.batcher.waiting
                return {
                    number: end.facts["value"] if isinstance(end, Output) else end
                    for number, end in sorted(self.told.ends.items())
                }
            self.stepper.advance()
        raise AssertionError("it does not come to an end")


@pytest.fixture(autouse=True)
def gradients_come_back():
    yield
    torch.set_grad_enabled(True)


def test_runs_of_different_length_share_and_each_gets_its_own():
    desk = Desk()
    for number in range(3):
        desk.join(number, desk.network.run(10.0**number, number + 1))
    assert desk.finish() == {0: 4, 1: 80, 2: 1600}
    assert desk.network.forwards[0] == [1, 10, 100]
    counted = desk.stepper.counters()
    assert (counted.forwards, counted.rows, counted.merged, counted.steps) == (3, 6, 5, 6)
    assert counted.rows_per_forward == 2 and counted.resident == 0 and counted.steps_per_second == pytest.approx(0.6)


def test_a_run_that_joins_later_meets_those_under_way():
    desk = Desk()
    desk.join(0, desk.network.run(1, 4, decode=False))
    desk.stepper.advance()
    desk.join(1, desk.network.run(100, 2, decode=False))
    assert desk.finish() == {0: 16, 1: 400}
    assert [len(forward) for forward in desk.network.forwards] == [1, 2, 2, 1]


def test_a_list_of_calls_is_answered_by_a_list_in_its_order():
    desk = Desk()

    def run():
        first = yield [desk.network.call(1, "a"), desk.network.call(2, "b"), desk.network.call(3, "a")]
        second = yield []
        (third,) = yield [desk.network.call(4)]
        return Output(facts={"value": (first, second, third)})

    desk.join(0, run())
    assert desk.finish() == {0: ([2, 4, 6], [], 8)}
    assert desk.network.forwards == [[1, 3], [2], [4]]


def test_one_id_is_one_run():
    desk = Desk()
    desk.join(0, desk.network.run(1, 1))
    with pytest.raises(ValueError, match="run 0"):
        desk.join(0, desk.network.run(1, 1))
    desk.stepper.advance()
    with pytest.raises(ValueError, match="run 0"):
        desk.join(0, desk.network.run(1, 1))


@pytest.mark.parametrize("after", range(5))
def test_cancelled_after_any_forward_it_leaves_without_another(after):
    desk = Desk()
    desk.join(0, desk.network.run(1, 3))
    desk.join(1, desk.network.run(100, 3))
    for _ in range(after):
        desk.stepper.advance()
    desk.cancelled.add(1)
    before = sum(value >= 100 for forward in desk.network.forwards for value in forward)
    ends = desk.finish()
    assert ends[0] == 16
    assert sum(value >= 100 for forward in desk.network.forwards for value in forward) == before
    assert isinstance(ends[1], Cancelled) if after < 5 else ends[1] == 1600


def test_a_cancelled_run_hears_of_it():
    desk, heard = Desk(), []

    def run():
        try:
            yield desk.network.call(1)
        finally:
            heard.append("closed")

    desk.join(0, run())
    desk.join(1, desk.network.run(1, 2))
    desk.batcher._most_rows = 1
    desk.stepper.advance()
    desk.join(2, run())
    desk.cancelled |= {1, 2}
    ends = desk.finish()
    assert heard == ["closed"] and isinstance(ends[1], Cancelled) and isinstance(ends[2], Cancelled)
    assert isinstance(ends[0], TypeError)  # it ended without an output


def test_a_cancelled_run_that_fails_on_its_way_out_is_gone_all_the_same(capsys):
    desk = Desk()

    def run():
        try:
            yield desk.network.call(1)
            yield desk.network.call(1)
        finally:
            raise ZeroDivisionError("on its way out")

    desk.join(0, run())
    desk.join(1, desk.network.run(1, 3))
    desk.stepper.advance()
    desk.cancelled.add(0)
    ends = desk.finish()
    assert isinstance(ends[0], Cancelled) and ends[1] == 16
    assert "on its way out" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [None, (), [None], 3], ids=repr)
def test_a_run_that_asks_for_no_forward_fails_alone(asked):
    desk = Desk()

    def run():
        yield desk.network.call(1)
        yield asked

    desk.join(0, run())
    desk.join(1, desk.network.run(1, 3))
    ends = desk.finish()
    assert isinstance(ends[0], TypeError) and ends[1] == 16


def test_a_network_that_gives_another_number_of_answers_fails_its_calls_alone():
    desk = Desk()

    class Forgetful(Doubler):
        name = "forgetful"

        def forward(self, calls):
            return super().forward(calls)[1:]

    desk.join(0, Forgetful().run(1, 2))
    desk.join(1, desk.network.run(1, 3))
    ends = desk.finish()
    assert "forgetful gave 0 answers to 1 calls" in str(ends[0]) and ends[1] == 16


@pytest.mark.parametrize("step", range(4))
def test_a_fault_at_any_step_is_the_guilty_runs_alone(step):
    desk = Desk()

    def fault(calls):
        if any(call.args[0] == 100 * 2**step for call in calls):
            raise ZeroDivisionError("of run 1")

    desk.network.fault = fault
    for number in range(3):
        desk.join(number, desk.network.run([1, 100, 7][number], 3))
    ends = desk.finish()
    assert isinstance(ends.pop(1), ZeroDivisionError) and ends == {0: 16, 2: 112}


def test_a_run_may_survive_a_fault_and_ask_for_something_else():
    desk = Desk()

    def fault(calls):
        if any(call.args[0] < 0 for call in calls):
            raise ZeroDivisionError

    def run():
        try:
            yield [desk.network.call(1, "a"), desk.network.call(-1, "b"), desk.network.call(5, "c")]
        except ZeroDivisionError:
            value = yield desk.network.call(50)
        return Output(facts={"value": value})

    desk.network.fault = fault
    desk.join(0, run())
    assert desk.finish() == {0: 100}
    assert [5] not in desk.network.forwards  # of what it had asked before, nothing is run any more


def out_of_memory_beyond(rows: int) -> Callable[[Sequence[StepCall]], None]:
    def fault(calls):
        if sum(call.rows for call in calls) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return fault


@pytest.mark.parametrize("fits", [1, 2, 3, 5])
def test_what_does_not_fit_is_halved_and_the_batcher_is_told(fits):
    desk = Desk()
    desk.network.fault = out_of_memory_beyond(fits)
    for number in range(6):
        desk.join(number, desk.network.run(number + 1, 3, decode=False))
    assert desk.finish() == {number: 8 * (number + 1) for number in range(6)}
    (limit,) = desk.batcher.limits.values()
    assert 1 <= limit <= fits
    lost = sum(len(forward) > fits for forward in desk.network.forwards)
    assert lost <= 3, "it keeps trying what has been seen not to fit"


def test_what_does_not_fit_alone_is_an_answer():
    desk = Desk()
    desk.network.fault = out_of_memory_beyond(1)
    big = [desk.network.call(1, rows=2)]
    desk.join(0, (call for call in big))
    desk.join(1, desk.network.run(1, 2))
    ends = desk.finish()
    assert isinstance(ends[0], OutOfMemory) and ends[1] == 8
    assert "smaller" in str(ends[0])


def test_where_the_host_has_no_room_either_it_is_an_answer_too():
    desk = Desk()
    desk.network.fault = out_of_memory_beyond(1)

    def no_room(_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    desk.stepper._shelter.move_out = no_room
    desk.join(0, (call for call in [desk.network.call(1, rows=2)]))
    desk.join(1, desk.network.run(1, 2))
    ends = desk.finish()
    assert isinstance(ends[0], OutOfMemory) and ends[1] == 8


def test_every_forward_that_worked_is_measured():
    desk = Desk()
    desk.network.fault = out_of_memory_beyond(2)
    for number in range(4):
        desk.join(number, desk.network.run(1, 1, decode=False))
    desk.finish()
    assert [(rows, seconds) for _, rows, seconds in desk.batcher.costs.learned] == [(2, 1.0), (2, 1.0)]


def test_gradients_are_off_whatever_a_run_does_to_them():
    """A `no_grad` entered first and left first would switch them on for the second run."""
    desk = Desk()

    def run(value, steps):
        with torch.no_grad():
            for _ in range(steps):
                value = yield desk.network.call(value)
                assert not torch.is_grad_enabled()
        return Output(facts={"value": value})

    torch.set_grad_enabled(True)
    desk.join(0, run(1, 2))
    desk.join(1, run(1, 5))
    assert desk.finish() == {0: 4, 1: 32}
    assert desk.network.grad == [False] * 5


# --- urgent runs and parked ones ------------------------------------------------------------------------------------


def test_an_urgent_run_takes_the_next_forward_and_the_others_go_on_as_they_were():
    desk = Desk(most_rows=1)
    desk.join(0, desk.network.run(1, 4, decode=False))
    desk.stepper.advance()
    desk.join(1, desk.network.run(100, 4, decode=False), priority=0)
    assert desk.finish() == {0: 16, 1: 1600}
    assert desk.network.forwards == [[1], [100], [200], [400], [800], [2], [4], [8]]
    assert desk.stepper.counters().preemptions == 1
    assert desk.told.parked == [(0, True), (0, False)]


def test_two_urgent_runs_in_turn_preempt_once_each():
    desk = Desk(most_rows=1)
    desk.join(0, desk.network.run(1, 6, decode=False))
    for number in (1, 2):
        desk.stepper.advance()
        desk.stepper.advance()
        desk.join(number, desk.network.run(100, 1, decode=False), priority=0)
    desk.finish()
    assert desk.stepper.counters().preemptions == 2
    assert desk.told.parked == []  # a second is not long


def test_who_has_not_begun_or_is_not_passed_over_is_not_parked():
    desk = Desk(most_rows=1)
    desk.join(0, desk.network.run(100, 5, decode=False), priority=0)
    desk.join(1, desk.network.run(1, 2, decode=False))
    desk.finish()
    assert desk.told.parked == [] and desk.stepper.counters().preemptions == 0


def test_only_the_seconds_of_forwards_count_for_being_parked():
    desk = Desk(most_rows=1)
    desk.join(0, desk.network.run(1, 3, decode=False))
    desk.stepper.advance()
    desk.network.now += 10 * PARKED_AFTER  # other models had the device
    desk.stepper.advance()
    assert desk.told.parked == []


def test_remaining_forwards_are_told_by_what_was_said_and_then_by_progress():
    desk = Desk()

    class Run:
        progress = 0.0

        def __init__(self):
            self.steps = desk.network.run(1, 8, decode=False)
            self.made = 0

        def send(self, answer):
            call = self.steps.send(answer)
            self.progress = max(0.0, (self.made // 2) / 4)  # two forwards a step
            self.made += 1
            return call

    run = Run()
    desk.join(0, run, remaining=20)
    seen = []
    while desk.stepper.busy:
        seen += [one.remaining for one in desk.batcher.waiting]
        desk.stepper.advance()
    assert seen == [19, 2 * 3, 3 * 3, 4 * 1, 5 * 1, 6 / 3, 7 / 3]
    assert desk.told.progress[0] == [0.25, 0.5, 0.75]
