"""Which jobs of which held batches nobody wants any more, and which batches are wanted back."""

from __future__ import annotations


class Drops:
    """Batches end in any order, and a job may be dropped after its batch has ended, which then leaves nothing behind.
    Each method is one step for the interpreter: the channel's thread drops while others ask."""

    def __init__(self) -> None:
        self._dropped: dict[int, set[str]] = {}
        self._recalled: set[int] = set()

    def hold(self, batch: int) -> None:
        """The batch has come: its jobs may be dropped from now on."""
        self._dropped[batch] = set()

    def drop(self, batch: int, job: str) -> None:
        """Nobody wants the job. Nothing happens when its batch is not held."""
        self._dropped.get(batch, set()).add(job)

    def forget(self, batch: int) -> None:
        """The batch has ended."""
        self._dropped.pop(batch, None)
        self._recalled.discard(batch)

    def recall(self, batch: int) -> None:
        """What the batch has not begun is wanted back. Nothing happens when it is not held."""
        self._recalled.add(batch)
        if batch not in self._dropped:  # asked after the adding: it may end at any moment
            self._recalled.discard(batch)

    def recalled(self, batch: int) -> bool:
        return batch in self._recalled

    def __contains__(self, place: tuple[int, str]) -> bool:
        return place[1] in self._dropped.get(place[0], ())

    def __len__(self) -> int:
        return len(self._dropped)
