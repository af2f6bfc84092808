"""Whatever waits, leaves, fails to fit and takes however long: no call is lost, run twice or run with strangers."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from models.stepping.batcher import StepBatcher, Waiting
from models.stepping.costs import StepCosts, variety_of

KEYS = {"text": 0, "unet 512": 1, "unet 1024": 1, "controlnet": 1, "vae": 2}
PATIENCE = 20.0
MOST_ROWS = 8


class BatcherMachine(RuleBasedStateMachine):
    """The model: what waits, since when, and a second batcher that is told the same and has to do the same."""

    @initialize(favour=st.sampled_from([0.0, 0.5, 4.0]))
    def start(self, favour: float) -> None:
        self.batcher, self.twin = (
            StepBatcher(StepCosts(), most_rows=MOST_ROWS, favour=favour, patience=PATIENCE) for _ in range(2)
        )
        self.pairs: dict[Waiting, Waiting] = {}  # what waits, and the same call at the twin
        self.limits: dict[str, int] = {}
        self.runs = 0
        self.now = 0.0
        self.most_favour = 0.0

    @rule(key=st.sampled_from(list(KEYS)), rows=st.sampled_from([1, 1, 2, 9]), priority=st.integers(0, 3),
          remaining=st.floats(0, 60), age=st.floats(0, 100), calls=st.sampled_from([1, 1, 2]),
          variant=st.sampled_from([None, None, "a", "b"]))
    def park(self, key, rows, priority, remaining, age, calls, variant):
        self.runs += 1
        for _ in range(calls):
            one, same = (
                Waiting(self.runs, key, rows, KEYS[key], priority, remaining, self.now - age, variant) for _ in range(2)
            )
            self.pairs[one] = same
            self.batcher.add(one)
            self.twin.add(same)

    @precondition(lambda self: self.pairs)
    @rule(which=st.floats(0, 1, exclude_max=True))
    def leave(self, which):
        one = list(self.pairs)[int(which * len(self.pairs))]
        self.batcher.remove(one)
        self.twin.remove(self.pairs.pop(one))

    @rule(key=st.sampled_from(list(KEYS)), rows=st.integers(1, 6))
    def does_not_fit(self, key, rows):
        self.limits[key] = min(rows, self.limits.get(key, rows))
        self.batcher.limit(key, rows)
        self.twin.limit(key, rows)

    @rule(seconds=st.floats(1e-3, 2.0))
    def step(self, seconds):
        gone = self.batcher.next()
        assert [self.pairs[one] for one in gone] == self.twin.next(), "two that heard the same differ"
        assert bool(gone) == bool(self.pairs), "somebody waits, and nobody goes"
        if not gone:
            return
        key, rows = gone[0].key, sum(one.rows for one in gone)
        assert len(set(gone)) == len(gone) and {one.key for one in gone} == {key}
        assert len(gone) == 1 or rows <= min(MOST_ROWS, self.limits.get(key, MOST_ROWS))
        self.nobody_was_passed_who_should_not(gone)
        for one in gone:
            del self.pairs[one]
        variety = variety_of(one.variant for one in gone)
        self.batcher.costs.learn(key, rows, seconds, variety)
        self.twin.costs.learn(key, rows, seconds, variety)
        self.now += seconds

    def nobody_was_passed_who_should_not(self, gone: list[Waiting]) -> None:
        """A head start is fixed when a call is filed, so the bounds are those of the longest there was."""
        self.most_favour = max(self.most_favour, self.batcher._most_favour)
        first = gone[0]
        for other in self.pairs:
            later = first.joined - other.joined
            assert later <= 3 * PATIENCE + 4 * self.most_favour, "somebody starves"
            if other.priority == 0 < first.priority and first.lane == other.lane:
                assert -later > 2 * PATIENCE - 4 * self.most_favour, "an urgent run was passed by one that is not"

    @invariant()
    def holds(self):
        if hasattr(self, "batcher"):
            self.batcher.check()
            self.batcher.costs.check()
            assert len(self.batcher) == len(self.pairs)


TestBatcher = BatcherMachine.TestCase
TestBatcher.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
