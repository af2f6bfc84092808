"""Models whose runs are coroutines: they ask for forwards of a network, and those that fit are run as one.

A run yields a `Call`, or a list of calls that may run at the same time, and is sent what the network answered. All
items of a batch start together; parked calls of the same network, shapes and dtypes are merged along their rows, run,
split, and the runs that have all their answers go on. A run that fails, or whose job is cancelled, leaves alone; what
has ended is handed over at once.
"""

from __future__ import annotations

import contextlib
import sys
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.errors import OutOfMemory
from models.base import Adapter, Item, Output
from models.checkpoint import Abandoned, OutOfTime, cancelled, next_part
from models.room import Forwards

LONG = 1 << 24  # input elements of a forward that may take long
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")

Answer = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One forward that a run waits for. `network`: which of the adapter's; `inputs`: tensors whose first dimension
    counts rows, equally many in each."""

    network: str
    inputs: tuple[Tensor, ...]

    @property
    def key(self) -> Hashable:
        """What must be equal for calls to be merged."""
        return self.network, *((tensor.shape[1:], tensor.dtype, tensor.device) for tensor in self.inputs)

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in self.inputs)


Run = Generator[Call | list[Call], Answer | list[Answer], Output]


class CallAdapter(Adapter):
    """A model whose items run as coroutines. Option `max_rows`: the most rows of one forward; 0: the usual number.

    A forward that does not fit the memory is tried again with half of it, and the bound is remembered; one call that
    does not fit alone fails its item with `OutOfMemory`. After any other exception the calls of that forward run one by
    one, so that only the guilty run gets it: thrown into it, where it may be caught and something else asked for.
    """

    def __init__(self, options: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(options, device)
        self._most_rows = int(options.get("max_rows") or self.usual_rows())
        self._room = Forwards()
        self._fits: dict[str, int] = {}  # by network, the input elements that fit the memory, once they did not

    @abstractmethod
    def start(self, item: Item) -> Run:
        """The item's run."""

    def usual_rows(self) -> int:
        """The most rows of one forward, unless the options say otherwise."""
        return 16

    @abstractmethod
    def forward(self, network: str, *inputs: Tensor) -> Answer:
        """One forward: a tensor, or a tuple of tensors, of as many rows as the inputs have. Where the device is a GPU,
        inputs from the host come in pinned memory, and the answer may be still on its way when this returns: it is read
        after the stream has come so far."""

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """In the items' order their outputs, or what ended a run instead; each is told to `Item.done` as soon as it is
        there. Sizes may differ from item to item."""
        runs = [_Running(item, self.start(item)) for item in items]
        parked = deque(one for running in runs for one in running.go_on())
        flights: deque[_Flight] = deque()
        depth = 2 if self.device.type == "cuda" else 1  # the next one is prepared while the device computes
        while parked or flights:
            parked = deque(one for one in parked if one.wanted())
            if parked and len(flights) < depth:
                self._launch(self._take(parked), parked, flights)
            elif flights:
                parked.extend(flights.popleft().land())
        return [running.end for running in runs]

    def _take(self, parked: deque[_Parked]) -> list[_Parked]:
        """The calls of the next forward, taken out of `parked`: the oldest, and those after it that fit beside it."""
        first = parked[0].call
        alone, rows, elements = parked[0].alone, self._most_rows, self._fits.get(first.network, sys.maxsize)
        aboard: list[_Parked] = []
        for one in list(parked):
            fits = one.key == parked[0].key and one.call.rows <= rows and one.call.elements <= elements
            if one.call is first or (fits and not alone and not one.alone):
                aboard.append(one)
                rows, elements = rows - one.call.rows, elements - one.call.elements
        taken = set(map(id, aboard))
        left = [one for one in parked if id(one) not in taken]
        parked.clear()
        parked.extend(left)
        return aboard

    def _launch(self, aboard: list[_Parked], parked: deque[_Parked], flights: deque[_Flight]) -> None:
        fault: Exception | None = None
        elements = sum(one.call.elements for one in aboard)
        try:
            with self._room.turn(elements) if self.device.type == "cpu" else contextlib.nullcontext():
                next_part(long=elements >= LONG)
                answer = self.forward(aboard[0].call.network, *self._merge([one.call for one in aboard]))
            flights.append(_Flight(aboard, answer, self._mark()))
            return
        except (Abandoned, OutOfTime):
            raise
        except Exception as error:
            if not lacks_memory(error):  # and if it does: to keep it would keep alive what filled the memory
                fault = error
        if fault is None:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if flights:
                parked.extend(flights.popleft().land())  # it holds memory too
            elif len(aboard) > 1:
                self._fits[aboard[0].call.network] = sum(one.call.elements for one in aboard) // 2
            else:
                parked.extend(aboard[0].fail(OutOfMemory(
                    "this image does not fit the device's memory even alone; send a smaller one, or let the model work "
                    "on parts of it where it offers that"
                )))
                return
        elif len(aboard) == 1:
            parked.extend(aboard[0].fail(fault))
            return
        for one in reversed(aboard):
            one.alone = one.alone or fault is not None
            parked.appendleft(one)

    def _merge(self, calls: list[Call]) -> list[Tensor]:
        """The calls' inputs joined along their rows."""
        columns = list(zip(*(call.inputs for call in calls), strict=True))
        if self.device.type != "cuda":
            return [column[0] if len(column) == 1 else torch.cat(column) for column in columns]
        return [_pinned(column) if column[0].device.type == "cpu" else torch.cat(column) for column in columns]

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        return done


@dataclass(eq=False, slots=True)
class _Running:
    """One item's run: what it waits for, what has come of that, how it ended."""

    item: Item
    run: Run
    answers: list[Answer | None] = field(default_factory=list)
    single: bool = False  # it yielded a call, not a list
    end: Output | Exception = field(default_factory=lambda: TypeError("the run has not ended"))

    def go_on(self, answers: Any = None, fault: Exception | None = None) -> list[_Parked]:
        """On to the next calls. None when the run has ended."""
        try:
            asked = self.run.throw(fault) if fault else self.run.send(answers)
            while not asked and isinstance(asked, list):
                asked = self.run.send([])
            self.single = isinstance(asked, Call)
            calls = [asked] if isinstance(asked, Call) else asked
            self.answers = [None] * len(calls)
            return [_Parked(self, self.answers, place, call, call.key) for place, call in enumerate(calls)]
        except StopIteration as end:
            self.finish(end.value if end.value is not None else TypeError("the run ended without an output"))
        except Exception as error:
            self.finish(error)
        return []

    def finish(self, end: Output | Exception) -> None:
        """Hand over what has come of it; what it still asked for is not wanted any more."""
        self.answers, self.end = [], end
        self.item.done(end)


@dataclass(eq=False, slots=True)
class _Parked:
    """A call that waits for its forward. `answers` is shared with its run and the other calls of one list."""

    running: _Running
    answers: list[Answer | None]
    place: int
    call: Call
    key: Hashable
    alone: bool = False

    def wanted(self) -> bool:
        """Whether somebody still waits for the answer. A cancelled run ends here."""
        if self.running.answers is not self.answers:
            return False
        if self.running.item.cancelled():
            self.running.run.close()
            self.running.finish(cancelled())
            return False
        return True

    def receive(self, answer: Answer) -> list[_Parked]:
        """The run's next calls, if this was the last answer that it waited for."""
        self.answers[self.place] = answer
        if self.running.answers is not self.answers or any(one is None for one in self.answers):
            return []
        return self.running.go_on(self.answers[0] if self.running.single else self.answers)

    def fail(self, fault: Exception) -> list[_Parked]:
        """The run's next calls, if it can live with that."""
        return self.running.go_on(fault=fault) if self.running.answers is self.answers else []


@dataclass(eq=False, slots=True)
class _Flight:
    """A forward that was started. `done` is passed by the stream when the answer is whole; None: it is."""

    aboard: list[_Parked]
    answer: Answer
    done: torch.cuda.Event | None

    def land(self) -> list[_Parked]:
        """Hand every call its rows; what the runs ask for next."""
        if self.done is not None:
            self.done.synchronize()
        asked: list[_Parked] = []
        start = 0
        for one in self.aboard:
            rows = slice(start, start + one.call.rows)
            asked += one.receive(self.answer[rows] if isinstance(self.answer, Tensor) else tuple(
                part[rows] for part in self.answer
            ))
            start = rows.stop
        return asked


def _pinned(tensors: tuple[Tensor, ...]) -> Tensor:
    """Host tensors joined along their rows in pinned memory, from where a device fetches them by itself."""
    rows = sum(len(tensor) for tensor in tensors)
    return torch.cat(tensors, out=torch.empty((rows, *tensors[0].shape[1:]), dtype=tensors[0].dtype, pin_memory=True))


def lacks_memory(fault: BaseException) -> bool:
    """Whether it says, in torch's words or in those of a library under it, that the device's memory is used up."""
    return isinstance(fault, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(fault, RuntimeError) and any(words in str(fault) for words in NO_MEMORY)
    )
